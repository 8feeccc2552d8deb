"""Which times training looks at: densities over t in [first_time, 1], as functions of a quantile u in [0, 1).

A density and how its quantiles are drawn are two things: `independent` ones, or `stratified` ones, which spread the
times of a batch evenly over the density and so take most of the noise of "which t was it" out of the gradient.
"""

from typing import Protocol

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtri

from diffusion_jax import rng
from diffusion_jax.diffusion.schedule import Schedule, first_time
from diffusion_jax.types import Array

GOLDEN = 0.6180339887498949
"""(sqrt(5) - 1) / 2: of all steps around a circle, the one whose multiples lie most evenly, however many are taken."""


class TimeSampling(Protocol):
    """(schedule, u f32[B] in [0, 1)) -> t f32[B] in [first_time(schedule), 1]: the density's inverse distribution."""

    def __call__(self, schedule: Schedule, u: Array) -> Array: ...  # noqa: D102


def uniform() -> TimeSampling:
    """Uniform in t (Ho et al. 2020, algorithm 1)."""

    def time(schedule: Schedule, u: Array) -> Array:
        first = first_time(schedule)
        return first + (1.0 - first) * u

    return time


def logit_normal(mean: float = 0.0, std: float = 1.0) -> TimeSampling:
    """logit(t) ~ N(mean, std^2): more of the middle (Esser et al. 2024, section 3.1)."""
    _positive(std)
    return lambda schedule, u: _within(schedule, jax.nn.sigmoid(mean + std * _normal(u)))


def log_normal(mean: float = -1.2, std: float = 1.2) -> TimeSampling:
    """ln(sigma / alpha) ~ N(mean, std^2): EDM's P_mean and P_std (Karras et al. 2022, Table 1)."""
    _positive(std)
    return lambda schedule, u: _within(schedule, schedule.time(-2.0 * (mean + std * _normal(u))))


TIME_SAMPLINGS = {"uniform": uniform, "logit_normal": logit_normal, "log_normal": log_normal}


def independent(key: Array, index: Array) -> Array:
    """Quantiles f32[B], each of its own key: for a step's key and i32[B], the places in the batch."""
    return rng.uniform(rng.example_keys(key, index))


def stratified(key: Array, index: Array) -> Array:
    """Quantiles f32[B], each uniform, and together spread evenly: u_i = (u_0 + i golden) mod 1.

    The idea of Kingma et al. 2021 (appendix I.1, u_0 + i / B) with a step that does not depend on the batch's size, so
    that any part of a batch is spread evenly too.
    """
    return jnp.mod(jax.random.uniform(key) + jnp.mod(index.astype(jnp.float32) * GOLDEN, 1.0), 1.0)


def _normal(u: Array) -> Array:
    return ndtri(jnp.clip(u, 1e-7, 1.0 - 1e-7))


def _positive(std: float) -> None:
    if not std > 0.0:
        raise ValueError(f"std must be positive, not {std}")


def _within(schedule: Schedule, t: Array) -> Array:
    return jnp.clip(t, first_time(schedule), 1.0)
