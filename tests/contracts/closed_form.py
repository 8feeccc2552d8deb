"""Data whose ideal denoiser and probability flow are known in closed form, and how to run a solver on it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats
from scipy.optimize import brentq

from diffusion_jax import plugs, rng
from diffusion_jax.diffusion.schedule import SCHEDULES
from diffusion_jax.diffusion.solvers import SOLVERS
from diffusion_jax.diffusion.solvers.base import solve
from diffusion_jax.types import Denoised


def mixture(schedule, data):
    """The ideal denoiser of a one-dimensional mixture of Gaussians: no division by alpha or sigma.

    data: (means, stds, shares) of the components, f[K] each. One component is a Gaussian, std 0 a point.
    """
    means, stds, shares = (a.reshape(1, 1, 1, 1, -1) for a in data)

    def denoise(x, t):
        alpha, sigma = (jnp.full((1,) * 5, c, x.dtype) for c in (schedule.alpha(t), schedule.sigma(t)))
        variance = alpha**2 * stds**2 + sigma**2
        off = x[..., None] - alpha * means
        share = jax.nn.softmax(jnp.log(shares) - 0.5 * jnp.log(variance) - 0.5 * off**2 / variance, axis=-1)
        x0 = jnp.sum(share * (means + alpha * stds**2 / variance * off), axis=-1)
        eps = jnp.sum(share * sigma / variance * off, axis=-1)
        return Denoised(x0, eps)

    return denoise


GAUSSIAN = ((0.4, 0.4), (0.5, 0.5), (0.5, 0.5))
TWO = ((-0.7, 0.6), (0.3, 0.2), (0.4, 0.6))
POINT = ((0.37, 0.37), (0.0, 0.0), (0.5, 0.5))


@functools.cache
def program(name):
    """(solver, data, times, steps, x, keys) -> x at the end, compiled once for each kind of solver."""
    schedule = plugs.build("schedule", name, SCHEDULES)
    return jax.jit(
        lambda solver, data, times, steps, x, keys: solve(
            mixture(schedule, data), schedule, solver, times, steps, x, keys
        )
    )


def run(text, name, data, times, x, key=0):
    """From x [n] at times[0] to the x [n] at times[-1], in float64."""
    solver = plugs.build("solver", text, SOLVERS)
    padded = jnp.zeros(1001).at[: len(times)].set(jnp.asarray(times))
    data = tuple(jnp.asarray(a, jnp.float64) for a in data)
    keys = rng.example_keys(jax.random.key(key), jnp.arange(len(x)))
    x = jnp.asarray(x, jnp.float64).reshape(-1, 1, 1, 1)
    return np.asarray(program(name)(solver, data, padded, jnp.int32(len(times) - 1), x, keys)).reshape(-1)


def curves(name, t):
    """(alpha, sigma) at t as NumPy float64."""
    schedule = plugs.build("schedule", name, SCHEDULES)
    t = jnp.asarray(t, jnp.float64)
    return np.asarray(schedule.alpha(t)), np.asarray(schedule.sigma(t))


def logsnr_grid(name, steps, high=60.0, low=0.02, zigzag=False):
    """Times between sigma / alpha = high and low: equal steps of log-SNR, or steps of 1 and 3 in turn."""
    width = np.where(np.arange(steps) % 2, 3.0, 1.0) if zigzag else np.ones(steps)
    u = np.concatenate([[0.0], np.cumsum(width)]) / width.sum()
    schedule = plugs.build("schedule", name, SCHEDULES)
    return np.asarray(schedule.time(jnp.asarray(-2.0 * (np.log(high) + u * np.log(low / high)))))


def cdf(x, alpha, sigma, data):
    return sum(
        share * stats.norm.cdf(x, alpha * m, np.hypot(alpha * s, sigma)) for m, s, share in zip(*data, strict=True)
    )


def transported(x, name, t, s, data):
    """Where the probability-flow ODE takes x from time t to s, without a solver: F_s(x_s) = F_t(x_t).

    In one dimension the flow keeps the points' order, and so their quantiles.
    """
    start, end = curves(name, t), curves(name, s)

    def inverse(quantile):
        return brentq(lambda y: cdf(y, *end, data) - quantile, -9.0, 9.0, xtol=1e-14)

    return np.array([inverse(cdf(v, *start, data)) for v in x])
