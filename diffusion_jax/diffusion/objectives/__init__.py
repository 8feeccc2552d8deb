"""Objectives: what a diffusion model is trained to regress on, one loss an example."""
