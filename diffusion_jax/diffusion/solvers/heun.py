"""Heun's second-order method on the probability-flow ODE (Karras et al. 2022, algorithm 1) in the straight frame."""

from dataclasses import dataclass

import jax

from diffusion_jax.diffusion.schedule import Schedule
from diffusion_jax.diffusion.solvers.base import pytree
from diffusion_jax.diffusion.straight import Straight
from diffusion_jax.types import Array, Denoiser


@pytree
@dataclass(frozen=True, kw_only=True)
class Heun:
    """An Euler step, then the mean of the slopes at both of its ends: of order 2, two evaluations a step.

    The last step, to s = 0, where the slope is not defined, is Euler's alone.
    """

    def init(self, x: Array) -> tuple:  # noqa: D102
        return ()

    def step(  # noqa: D102
        self, denoise: Denoiser, schedule: Schedule, x: Array, t: Array, s: Array, carry: tuple, keys: Array
    ) -> tuple[Array, tuple]:
        frame = Straight(schedule)
        first = frame.slope(denoise(x, t))
        euler = frame.move(x, t, s, first)

        def correct() -> Array:
            second = frame.slope(denoise(euler, s))
            return frame.move(x, t, s, 0.5 * (first + second))

        return jax.lax.cond(s > 0.0, correct, lambda: euler), carry
