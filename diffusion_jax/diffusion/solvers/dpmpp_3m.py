"""DPM-Solver++(3M) as published, which is of order 2, and the multistep method with its slip mended, of order 3.

Through the last three x0 goes a parabola, x0 + u x0' + u^2 x0'' / 2 at lambda_t + u, and

    x_s = alpha_s x0 + sigma_s eps + alpha_s (M_1 x0' + M_2 x0'' / 2),   M_n = int_0^h e^(u - h) u^n du.

The published step (Lu et al. 2022b in their code, `multistep_dpm_solver_third_update`, and in most libraries) has half
of the last term: it multiplies phi_3 h^3 = M_2 / 2 by a divided difference, which is x0'' / 2, as if it were x0''.
"""

from dataclasses import dataclass

import jax.numpy as jnp

from diffusion_jax.diffusion.broadcast import over
from diffusion_jax.diffusion.schedule import Schedule
from diffusion_jax.diffusion.solvers.base import pytree
from diffusion_jax.diffusion.solvers.log_steps import ddim, exponential_moments, log_step
from diffusion_jax.diffusion.solvers.memory import Memory, behind, beyond_first, empty
from diffusion_jax.types import Array, Denoiser


class _AlongParabola:
    """The step above, of whose moments M_0, M_1, M_2 the parts `kept` are used; one evaluation.

    DDIM's step first, then along a straight line, then along the parabola; DDIM's again from alpha = 0 or to sigma = 0.
    """

    kept = (1.0, 1.0, 1.0)

    def init(self, x: Array) -> Memory:
        return empty(x, 2)

    def step(
        self, denoise: Denoiser, schedule: Schedule, x: Array, t: Array, s: Array, carry: Memory, keys: Array
    ) -> tuple[Array, Memory]:
        h = log_step(schedule, t, s)
        d = denoise(x, t)
        moments = exponential_moments(h, 3)
        parts = jnp.asarray(self.kept, moments.dtype)
        added = beyond_first((d.x0, *carry.values), behind(carry.steps), carry.steps, parts * moments)
        return ddim(schedule, d, s) + over(schedule.alpha(s), x) * added, carry.push(d.x0, h)


@pytree
@dataclass(frozen=True, kw_only=True)
class DPMpp3M(_AlongParabola):
    """The published step, of order 2. Use `exponential_3m` for order 3.

    Its second step goes along the line through both x0; the authors' code takes 2M's there, which halves the slope.
    """

    kept = (1.0, 1.0, 0.5)


@pytree
@dataclass(frozen=True, kw_only=True)
class Exponential3M(_AlongParabola):
    """The mended step, of order 3 (Hochbruck & Ostermann 2010, section 2.5: exponential Adams)."""
