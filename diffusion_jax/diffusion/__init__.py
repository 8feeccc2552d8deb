"""Diffusion, factored: schedules, predictions, weightings, objectives, guidance, solvers, time grids.

x_t = alpha(t) x0 + sigma(t) eps with t in [0, 1] and the data at t = 0. This room knows no network.
"""
