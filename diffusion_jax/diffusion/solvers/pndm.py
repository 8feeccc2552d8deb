"""PLMS, the linear multistep part of PNDM (Liu et al. 2022, section 3)."""

from dataclasses import dataclass

import jax.numpy as jnp

from diffusion_jax.diffusion.broadcast import over
from diffusion_jax.diffusion.schedule import Schedule
from diffusion_jax.diffusion.solvers.base import pytree
from diffusion_jax.diffusion.solvers.log_steps import ddim
from diffusion_jax.types import Array, Denoiser

Recalled = tuple[tuple[Array, ...], Array]
"""(the last three eps, newest first; i32[], how many of them there are)."""

ADAMS_BASHFORTH = (
    (1, 0, 0, 0),
    (3 / 2, -1 / 2, 0, 0),
    (23 / 12, -16 / 12, 5 / 12, 0),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
"""Weights of the newest and older slopes over equal steps, by the number of older ones."""


@pytree
@dataclass(frozen=True, kw_only=True)
class PNDM:
    """DDIM's step along a mean of the last four eps; one evaluation a step.

    e' = (55 e_t - 59 e_(t-1) + 37 e_(t-2) - 9 e_(t-3)) / 24, then
    x_s = alpha_s / alpha_t x_t + (sigma_s - alpha_s sigma_t / alpha_t) e'.

    The weights are those of equal steps, whatever the grid: of order 4 only where sigma / alpha falls by equal steps,
    of order 2 where the steps' lengths change gradually, and of order 1 where they jump. The first steps take the
    lower orders' weights, where the paper spends Runge-Kutta steps.
    """

    def init(self, x: Array) -> Recalled:  # noqa: D102
        return (jnp.zeros_like(x),) * 3, jnp.zeros((), jnp.int32)

    def step(  # noqa: D102
        self, denoise: Denoiser, schedule: Schedule, x: Array, t: Array, s: Array, carry: Recalled, keys: Array
    ) -> tuple[Array, Recalled]:
        older, count = carry
        d = denoise(x, t)
        weights = jnp.asarray(ADAMS_BASHFORTH, x.dtype)[count]
        change = sum(w * (e - d.eps) for w, e in zip(weights[1:], older, strict=True))  # e' - e_t
        # DDIM's step along e_t and what the change of eps adds to it, which is nothing in a first step from alpha = 0
        along = schedule.sigma(s) - schedule.alpha(s) * schedule.sigma(t) / schedule.alpha(t)
        x = ddim(schedule, d, s) + over(jnp.where(count == 0, 0.0, along), x) * change
        return x, ((d.eps, *older[:-1]), jnp.minimum(count + 1, 3))
