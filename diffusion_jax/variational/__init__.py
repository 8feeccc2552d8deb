"""Posteriors, likelihoods and bounds of variational training. Knows no network."""
