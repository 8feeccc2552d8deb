"""Linear multistep on the probability-flow ODE: Adams-Bashforth with steps of any lengths, in the straight frame."""

from dataclasses import dataclass

import jax.numpy as jnp

from diffusion_jax.diffusion.broadcast import over
from diffusion_jax.diffusion.schedule import Schedule
from diffusion_jax.diffusion.solvers.base import pytree
from diffusion_jax.diffusion.solvers.memory import Memory, behind, beyond_first, empty
from diffusion_jax.diffusion.straight import Straight
from diffusion_jax.types import Array, Denoiser


@pytree
@dataclass(frozen=True, kw_only=True)
class LMS:
    """Adams-Bashforth of `order` 1 to 4, one evaluation a step; `order` 2 is the one named after both men.

    x_s / c_s = x_t / c_t + int p(tau) d tau, p the polynomial through the last `order` slopes d(x / c) / d tau,
    integrated exactly (Hairer, Norsett & Wanner 1993, III.5). Where alpha is 1, tau is sigma, and this is the LMS
    sampler of k-diffusion. Regular from alpha = 0 to sigma = 0. The first steps use the slopes that there are: in the
    noise that does not count, but an encoding starts in the image, and is of order 2 at most.
    """

    order: int = 4

    def __post_init__(self) -> None:
        if not 1 <= self.order <= 4:
            raise ValueError(f"order must be 1, 2, 3 or 4, not {self.order}")

    def init(self, x: Array) -> Memory:  # noqa: D102
        return empty(x, self.order - 1)

    def step(  # noqa: D102
        self, denoise: Denoiser, schedule: Schedule, x: Array, t: Array, s: Array, carry: Memory, keys: Array
    ) -> tuple[Array, Memory]:
        frame = Straight(schedule)
        slope = frame.slope(denoise(x, t))
        h = (frame.time(s) - frame.time(t)).astype(jnp.result_type(float))
        # int_0^h u^n du = h^(n + 1) / (n + 1)
        moments = jnp.stack([h ** (n + 1) / (n + 1) for n in range(self.order)])
        added = beyond_first((slope, *carry.values), behind(carry.steps), carry.steps, moments)
        return frame.move(x, t, s, slope) + over(frame.scale(s), x) * added, carry.push(slope, h)
