"""DPM-Solver-3, singlestep, in eps (Lu et al. 2022, algorithm 2 with r_1 = 1/3, r_2 = 2/3)."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from diffusion_jax.diffusion.broadcast import over
from diffusion_jax.diffusion.schedule import Schedule
from diffusion_jax.diffusion.solvers.base import pytree
from diffusion_jax.diffusion.solvers.log_steps import between, ddim, log_step
from diffusion_jax.types import Array, Denoiser


@pytree
@dataclass(frozen=True, kw_only=True)
class DPMSolver3:
    """Two stops within the step, at a third and two thirds of it in log-SNR: of order 3, three evaluations.

    With phi(h) = (e^h - 1) / h - 1, times t_1, t_2 and D_i = eps(u_i, t_i) - eps:

        u_1 = alpha_1 x0 + sigma_1 eps
        u_2 = alpha_2 x0 + sigma_2 eps - 2 sigma_2 phi(2h/3) D_1
        x_s = alpha_s x0 + sigma_s eps - 3/2 sigma_s phi(h) D_2

    One evaluation and order 1 in a step from alpha = 0 or to sigma = 0.
    """

    def init(self, x: Array) -> tuple:  # noqa: D102
        return ()

    def step(  # noqa: D102
        self, denoise: Denoiser, schedule: Schedule, x: Array, t: Array, s: Array, carry: tuple, keys: Array
    ) -> tuple[Array, tuple]:
        h = log_step(schedule, t, s)
        d = denoise(x, t)
        first = ddim(schedule, d, s)

        def sigma_phi(s: Array, h: Array) -> Array:
            return over(schedule.sigma(s) * (jnp.expm1(h) / h - 1.0), x)

        def third() -> Array:
            t1, t2 = between(schedule, t, h, 1 / 3), between(schedule, t, h, 2 / 3)
            d1 = denoise(ddim(schedule, d, t1), t1).eps - d.eps
            u2 = ddim(schedule, d, t2) - 2.0 * sigma_phi(t2, 2 / 3 * h) * d1
            d2 = denoise(u2, t2).eps - d.eps
            return first - 1.5 * sigma_phi(s, h) * d2

        return jax.lax.cond(h != 0.0, third, lambda: first), carry
