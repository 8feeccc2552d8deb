"""DPM-Solver++(2M), multistep, in x0 (Lu et al. 2022b, algorithm 2)."""

from dataclasses import dataclass

from diffusion_jax.diffusion.broadcast import over
from diffusion_jax.diffusion.schedule import Schedule
from diffusion_jax.diffusion.solvers.base import pytree
from diffusion_jax.diffusion.solvers.log_steps import ddim, exponential_moments, log_step
from diffusion_jax.diffusion.solvers.memory import Memory, empty, ratio
from diffusion_jax.types import Array, Denoiser


@pytree
@dataclass(frozen=True, kw_only=True)
class DPMpp2M:
    """One evaluation a step and the one before it: of order 2.

    x_s = sigma_s / sigma_t x_t + alpha_s (1 - e^-h) D,  D = (1 + 1 / 2r) x0 - 1 / 2r x0_last,  r = h_last / h.
    D is x0 alone in the first step, and in steps that come from alpha = 0 or go to sigma = 0.
    """

    def init(self, x: Array) -> Memory:  # noqa: D102
        return empty(x, 1)

    def step(  # noqa: D102
        self, denoise: Denoiser, schedule: Schedule, x: Array, t: Array, s: Array, carry: Memory, keys: Array
    ) -> tuple[Array, Memory]:
        h = log_step(schedule, t, s)
        d = denoise(x, t)
        change = over(0.5 * ratio(h, carry.steps[0]), x) * (d.x0 - carry.values[0])  # D - x0
        x = ddim(schedule, d, s) + over(schedule.alpha(s) * exponential_moments(h, 1)[0], x) * change
        return x, carry.push(d.x0, h)
