"""Which times training looks at: densities over t in [first_time, 1], one draw an example."""

from typing import Protocol

import jax
import jax.numpy as jnp

from diffusion_jax import rng
from diffusion_jax.diffusion.schedule import Schedule, first_time
from diffusion_jax.types import Array


class TimeSampling(Protocol):
    """(schedule, keys key[B]) -> t f32[B] in [first_time(schedule), 1]."""

    def __call__(self, schedule: Schedule, keys: Array) -> Array: ...  # noqa: D102


def uniform() -> TimeSampling:
    """Uniform in t (Ho et al. 2020, algorithm 1)."""

    def sample(schedule: Schedule, keys: Array) -> Array:
        first = first_time(schedule)
        return first + (1.0 - first) * rng.uniform(keys)

    return sample


def logit_normal(mean: float = 0.0, std: float = 1.0) -> TimeSampling:
    """logit(t) ~ N(mean, std^2): more of the middle (Esser et al. 2024, section 3.1)."""
    _positive(std)
    return lambda schedule, keys: _within(schedule, jax.nn.sigmoid(mean + std * rng.normal(keys, ())))


def log_normal(mean: float = -1.2, std: float = 1.2) -> TimeSampling:
    """ln(sigma / alpha) ~ N(mean, std^2): EDM's P_mean and P_std (Karras et al. 2022, Table 1)."""
    _positive(std)
    return lambda schedule, keys: _within(schedule, schedule.time(-2.0 * (mean + std * rng.normal(keys, ()))))


def _positive(std: float) -> None:
    if not std > 0.0:
        raise ValueError(f"std must be positive, not {std}")


def _within(schedule: Schedule, t: Array) -> Array:
    return jnp.clip(t, first_time(schedule), 1.0)


TIME_SAMPLINGS = {"uniform": uniform, "logit_normal": logit_normal, "log_normal": log_normal}
