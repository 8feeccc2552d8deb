"""Euler's method on the probability-flow ODE (Song et al. 2021, eq. 13) in the schedule's straight frame.

On straight schedules this is Euler's method in sigma (Karras et al. 2022) and in t (Lipman et al. 2022). Along straight
lines an Euler step holds x0 and eps still: in exact arithmetic it is DDIM's step at eta = 0, for every schedule.
"""

from dataclasses import dataclass

from diffusion_jax.diffusion.schedule import Schedule
from diffusion_jax.diffusion.solvers.base import pytree
from diffusion_jax.diffusion.straight import Straight
from diffusion_jax.types import Array, Denoiser


@pytree
@dataclass(frozen=True, kw_only=True)
class Euler:
    """One slope a step, of order 1."""

    def init(self, x: Array) -> tuple:  # noqa: D102
        return ()

    def step(  # noqa: D102
        self, denoise: Denoiser, schedule: Schedule, x: Array, t: Array, s: Array, carry: tuple, keys: Array
    ) -> tuple[Array, tuple]:
        frame = Straight(schedule)
        return frame.move(x, t, s, frame.slope(denoise(x, t))), carry
