"""SDE-DPM-Solver++(2M) (Lu et al. 2022b), for any schedule."""

from dataclasses import dataclass

import jax.numpy as jnp

from diffusion_jax.diffusion.broadcast import over
from diffusion_jax.diffusion.schedule import Schedule
from diffusion_jax.diffusion.solvers.base import pytree
from diffusion_jax.diffusion.solvers.kernel import forward_kernel, with_noise
from diffusion_jax.diffusion.solvers.log_steps import log_step
from diffusion_jax.diffusion.solvers.memory import Memory, empty, ratio
from diffusion_jax.types import Array, Denoiser


@pytree
@dataclass(frozen=True, kw_only=True)
class SDEDPMpp2M:
    """The reverse SDE with the x0 of the middle of the step, on a line through the last two.

    With h the step in log(alpha / sigma) and h_last the step before,

        x_s = sigma_s / sigma_t e^-h x_t + alpha_s (1 - e^-2h) (x0 + h / (2 h_last) (x0 - x0_last))
              + sigma_s sqrt(1 - e^-2h) z.

    e^-2h is r of `kernel`: without the difference of the two x0 this is DDPM's step with the posterior's variance. The
    difference is left out where there is no last x0, where h_last was infinite (alpha was 0) and in the step to s = 0,
    where h is.
    """

    def init(self, x: Array) -> Memory:  # noqa: D102
        return empty(x, 1)

    def step(  # noqa: D102
        self, denoise: Denoiser, schedule: Schedule, x: Array, t: Array, s: Array, carry: Memory, keys: Array
    ) -> tuple[Array, Memory]:
        d = denoise(x, t)
        alpha_s, sigma_s, (_, r) = schedule.alpha(s), schedule.sigma(s), forward_kernel(schedule, s, t)
        h = log_step(schedule, t, s)  # 0 where it is infinite
        ahead = over(0.5 * ratio(h, carry.steps[0]), x) * (d.x0 - carry.values[0])
        mean = over(alpha_s, x) * (d.x0 + over(1.0 - r, x) * ahead) + over(sigma_s * jnp.sqrt(r), x) * d.eps
        return with_noise(mean, sigma_s * jnp.sqrt(1.0 - r), keys), carry.push(d.x0, h)
