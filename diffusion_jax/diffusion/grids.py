"""Time grids: at which times a solver stops, from 1 down to 0.

A grid is f32[MAX_STEPS + 1]; its first `steps` + 1 entries fall from the noise to exactly 0 and the rest stay there.
Its length does not depend on the number of steps, so that number is traced and changing it does not compile again.
"""

from typing import Protocol

import jax.numpy as jnp

from diffusion_jax.diffusion.schedule import Schedule
from diffusion_jax.types import Array

MAX_STEPS = 1000


class Grid(Protocol):
    """(schedule, steps i32[]) -> f32[MAX_STEPS + 1], falling to 0 at entry `steps`."""

    def __call__(self, schedule: Schedule, steps: Array) -> Array: ...  # noqa: D102


def _ending(t: Array, steps: Array) -> Array:
    return jnp.where(jnp.arange(MAX_STEPS + 1) < steps, t, 0.0)


def uniform() -> Grid:
    """t_i = 1 - i / steps."""
    return lambda schedule, steps: _ending(1.0 - _index() / _float(steps), steps)


def quadratic() -> Grid:
    """t_i = (1 - i / steps)^2: small steps at the end, where details are decided (Song, Meng & Ermon 2021, D.2)."""
    return lambda schedule, steps: _ending((1.0 - _index() / _float(steps)) ** 2, steps)


def karras(rho: float = 7.0, sigma_min: float = 0.002, sigma_max: float = 80.0) -> Grid:
    """Equal steps in (sigma/alpha)^(1/rho) from sigma_max to sigma_min, then 0 (Karras et al. 2022, eq. 5)."""
    if not (rho > 0.0 and 0.0 < sigma_min < sigma_max):
        raise ValueError(f"needs rho > 0 and 0 < sigma_min < sigma_max, not {rho}, {sigma_min} and {sigma_max}")

    def times(schedule: Schedule, steps: Array) -> Array:
        u = jnp.clip(_index() / _float(jnp.maximum(steps - 1, 1)), 0.0, 1.0)
        high, low = sigma_max ** (1.0 / rho), sigma_min ** (1.0 / rho)
        ratio = (high + u * (low - high)) ** rho
        return _ending(jnp.clip(schedule.time(-2.0 * jnp.log(ratio)), 0.0, 1.0), steps)

    return times


def _index() -> Array:
    return jnp.arange(MAX_STEPS + 1, dtype=jnp.float32)


def _float(steps: Array) -> Array:
    return jnp.asarray(steps, jnp.float32)


GRIDS = {"uniform": uniform, "quadratic": quadratic, "karras": karras}
