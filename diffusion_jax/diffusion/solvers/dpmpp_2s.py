"""DPM-Solver++(2S), singlestep, in x0 (Lu et al. 2022b, algorithm 1 with r = 1/2)."""

from dataclasses import dataclass

import jax

from diffusion_jax.diffusion.broadcast import over
from diffusion_jax.diffusion.schedule import Schedule
from diffusion_jax.diffusion.solvers.base import pytree
from diffusion_jax.diffusion.solvers.log_steps import between, ddim, exponential_moments, log_step
from diffusion_jax.types import Array, Denoiser


@pytree
@dataclass(frozen=True, kw_only=True)
class DPMpp2S:
    """DDIM to the middle of the step in log-SNR, whose x0 then serves the whole step: of order 2, two evaluations.

    x_s = sigma_s / sigma_t x_t + alpha_s (1 - e^-h) x0(x_m, m), m at lambda_t + h / 2. One evaluation and order 1 in a
    step from alpha = 0 or to sigma = 0, whose middle in log-SNR does not exist.
    """

    def init(self, x: Array) -> tuple:  # noqa: D102
        return ()

    def step(  # noqa: D102
        self, denoise: Denoiser, schedule: Schedule, x: Array, t: Array, s: Array, carry: tuple, keys: Array
    ) -> tuple[Array, tuple]:
        h = log_step(schedule, t, s)
        d = denoise(x, t)
        first = ddim(schedule, d, s)

        def second() -> Array:
            middle = between(schedule, t, h, 1 / 2)
            change = denoise(ddim(schedule, d, middle), middle).x0 - d.x0
            # alpha_s (1 - e^-h) x0 of the change alone: the rest is `first`
            return first + over(schedule.alpha(s) * exponential_moments(h, 1)[0], x) * change

        return jax.lax.cond(h != 0.0, second, lambda: first), carry
