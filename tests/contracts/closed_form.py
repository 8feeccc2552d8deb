"""Data whose ideal denoiser and probability flow are known in closed form, and how to run a solver on it."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats
from scipy.optimize import brentq

from diffusion_jax import plugs, rng
from diffusion_jax.diffusion.broadcast import over
from diffusion_jax.diffusion.solvers import SOLVERS
from diffusion_jax.diffusion.solvers.base import solve
from diffusion_jax.types import Denoised
from tests import schedules


def mixture(schedule, data):
    """The ideal denoiser of a one-dimensional mixture of Gaussians: no division by alpha or sigma.

    data: (means, stds, shares) of the components, f[K] each. One component is a Gaussian, std 0 a point.
    """
    means, stds, shares = (a.reshape(1, 1, 1, 1, -1) for a in data)

    def denoise(x, t):
        alpha, sigma = (over(c, x)[..., None] for c in (schedule.alpha(t), schedule.sigma(t)))
        variance = alpha**2 * stds**2 + sigma**2
        off = x[..., None] - alpha * means
        share = jax.nn.softmax(jnp.log(shares) - 0.5 * jnp.log(variance) - 0.5 * off**2 / variance, axis=-1)
        x0 = jnp.sum(share * (means + alpha * stds**2 / variance * off), axis=-1)
        eps = jnp.sum(share * sigma / variance * off, axis=-1)
        return Denoised(x0, eps)

    return denoise


GAUSSIAN = ((0.4, 0.4), (0.5, 0.5), (0.5, 0.5))
TWO = ((-0.7, 0.6), (0.3, 0.2), (0.4, 0.6))
FINITE = ((-0.7, 0.6), (0.0, 0.0), (0.4, 0.6))
POINT = ((0.37, 0.37), (0.0, 0.0), (0.5, 0.5))


ROWS = {name: schedules.build(name) for name in schedules.EVERY}


@dataclass(frozen=True)
class Picked:
    """The row of `names` at a place that is traced: a program that is compiled once serves all of them."""

    place: jax.Array
    names: tuple[str, ...] = tuple(ROWS)

    def alpha(self, t):
        return self._of("alpha", t)

    def sigma(self, t):
        return self._of("sigma", t)

    def time(self, logsnr):
        return self._of("time", logsnr)

    def _of(self, curve, t):
        rows = [getattr(ROWS[name], curve) for name in self.names]
        if isinstance(t, jax.core.Tracer):
            return jax.lax.switch(self.place, rows, t)
        with jax.ensure_compile_time_eval():
            values = jnp.stack([row(t) for row in rows])
        return values[self.place]


def place(name, names=tuple(ROWS)):
    """Where `Picked` finds the schedule."""
    return jnp.int32(names.index(name))


@functools.cache
def program(ideal, names):
    """(solver, place, data, times, steps, x, keys) -> x at the end, compiled once for each kind of solver.

    For the schedules `names`: for one of each sort it compiles in a quarter of the time.
    """

    def sample(solver, place, data, times, steps, x, keys):
        schedule = Picked(place, names)
        return solve(ideal(schedule, data), schedule, solver, times, steps, x, keys)

    return jax.jit(sample)


def run(text, name, data, times, x, key=0):
    """From x [n] at times[0] to the x [n] at times[-1], in float64."""
    return _run(text, name, mixture, data, times, np.reshape(x, (-1, 1, 1, 1)), key).reshape(-1)


def _run(text, name, ideal, data, times, x, key=0):
    solver = plugs.build("solver", text, SOLVERS)
    padded = jnp.zeros(1001).at[: len(times)].set(jnp.asarray(times))
    data = tuple(jnp.asarray(a, jnp.float64) for a in data)
    keys = rng.example_keys(jax.random.key(key), jnp.arange(len(x)))
    x, steps = jnp.asarray(x, jnp.float64), jnp.int32(len(times) - 1)
    names = schedules.SORTS if name in schedules.SORTS else tuple(ROWS)
    return np.asarray(program(ideal, names)(solver, place(name, names), data, padded, steps, x, keys))


def curves(name, t):
    """(alpha, sigma) at t as NumPy float64."""
    schedule, t = ROWS[name], jnp.asarray(t, jnp.float64)
    return np.asarray(schedule.alpha(t)), np.asarray(schedule.sigma(t))


@functools.cache
def time_of(name):
    """The schedule's `time`, compiled once: a learned one bisects."""
    return jax.jit(ROWS[name].time)


def logsnr_grid(name, steps, high=60.0, low=0.02, zigzag=False):
    """Times between sigma / alpha = high and low: equal steps of log-SNR, or steps of 1 and 3 in turn."""
    width = np.where(np.arange(1000) % 2, 3.0, 1.0) if zigzag else np.ones(1000)
    u = np.concatenate([[0.0], np.cumsum(width)]) / width[:steps].sum()
    times = time_of(name)(jnp.asarray(-2.0 * (np.log(high) + np.minimum(u, 1.0) * np.log(low / high))))
    return np.asarray(times)[: steps + 1]


def cdf(x, alpha, sigma, data):
    return sum(
        share * stats.norm.cdf(x, alpha * m, np.hypot(alpha * s, sigma)) for m, s, share in zip(*data, strict=True)
    )


def transported(x, name, t, s, data):
    """Where the probability-flow ODE takes x from time t to s, without a solver: F_s(x_s) = F_t(x_t).

    In one dimension the flow keeps the points' order, and so their quantiles.
    """
    start, end = curves(name, t), curves(name, s)
    far = 9.0 * np.hypot(*end)

    def inverse(quantile):
        return brentq(lambda y: cdf(y, *end, data) - quantile, -far, far, xtol=1e-14)

    return np.array([inverse(cdf(v, *start, data)) for v in x])


@functools.cache
def between(name, t, s, data):
    """Four x at t, spread over the data's law there, and where the exact flow takes them."""
    alpha, sigma = curves(name, t)
    x = alpha * 0.1 + np.hypot(sigma, 0.5 * alpha) * np.array([-1.3, -0.4, 0.5, 1.6])
    return x, transported(x, name, t, s, data)


COUNTS = (64, 128, 256, 512)


def errors(text, name, data, counts, zigzag=False, encode=False):
    """Mean distance from the exact flow after each of `counts` steps in log-SNR, in float64.

    Over three stretches, from sigma / alpha = 60 to 1, to 0.2 and to 0.02: on one stretch alone a method's error may
    happen to pass through 0. With `encode` the stretches are walked upwards, each count to the same end.
    """
    total = np.zeros(len(counts))
    for low in (1.0, 0.2, 0.02):
        grids = [logsnr_grid(name, n, low=low, zigzag=zigzag)[:: -1 if encode else 1] for n in counts]
        x, truth = between(name, float(grids[0][0]), float(grids[0][-1]), data)
        total += [np.abs(run(text, name, data, times, x) - truth).mean() for times in grids]
    return total / 3


def order(text, name, data, counts=COUNTS, **options):
    """(the slope of -log(error) over log(steps), the errors)."""
    found = errors(text, name, data, counts, **options)
    return slope(counts, found), found


def slope(counts, errors):
    """Of -log(error) over log(steps)."""
    return -np.polyfit(np.log(counts), np.log(errors), 1)[0]


# ------------------------------------------------------------------------------------------ correlated pixels


ANGLE, VARIANCES = 0.6, (1.0, 0.04)
PIXELS = (np.array([[np.cos(ANGLE), -np.sin(ANGLE)], [np.sin(ANGLE), np.cos(ANGLE)]]), np.array(VARIANCES))
"""N(0, C) over two pixels: C's eigenvectors, in columns, and its eigenvalues."""


def correlated(schedule, data):
    """The ideal denoiser of `PIXELS`: along an eigenvector x0 = alpha c x / (alpha^2 c + sigma^2)."""
    turn, variances = data

    def denoise(x, t):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        along = x.reshape(-1, 2) @ turn / (alpha**2 * variances + sigma**2)[None]
        back = lambda y: (y @ turn.T).reshape(x.shape)
        return Denoised(back(alpha * variances[None] * along), back(sigma * along))

    return denoise


def carried(x, name, t, s):
    """Where the exact flow takes x [n,1,2,1] of `PIXELS`: C_s^1/2 C_t^-1/2 x, where C_t = alpha^2 C + sigma^2."""
    turn, variances = PIXELS
    (a, b), (c, d) = curves(name, t), curves(name, s)
    ratio = np.sqrt((c**2 * variances + d**2) / (a**2 * variances + b**2))
    return ((x.reshape(-1, 2) @ turn) * ratio @ turn.T).reshape(x.shape)


def order_on_pixels(text, name, counts=COUNTS, high=60.0):
    """As `order`, of `PIXELS`, from two vectors of the law's size at sigma / alpha = `high`."""
    found = np.zeros(len(counts))
    for low in (1.0, 0.2, 0.02):
        for i, count in enumerate(counts):
            times = logsnr_grid(name, count, high=high, low=low)
            x = curves(name, times[0])[1] * np.array([[1.0, -0.7], [0.3, 1.2]]).reshape(2, 1, 2, 1)
            end = _run(text, name, correlated, PIXELS, times, x)
            found[i] += np.abs(end - carried(x, name, times[0], times[-1])).mean()
    return slope(counts, found), found
