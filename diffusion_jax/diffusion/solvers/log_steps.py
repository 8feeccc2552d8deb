"""Steps in log-SNR, the clock of the exponential integrators (Lu et al. 2022, section 3; Lu et al. 2022b, section 4).

With lambda = log(alpha / sigma) and h = lambda_s - lambda_t the probability-flow ODE is solved (2022b, eq. 8) by

    x_s = sigma_s / sigma_t x_t + alpha_s int_0^h e^(u - h) x0(lambda_t + u) du.

An x0 that stands still gives DDIM, alpha_s x0 + sigma_s eps; the solvers differ in what they add to that. lambda is
infinite where alpha or sigma is 0. There `log_step` is 0, all that would be added vanishes, and DDIM is left.
"""

import jax.numpy as jnp

from diffusion_jax.diffusion.broadcast import over
from diffusion_jax.diffusion.schedule import Schedule, logsnr
from diffusion_jax.types import Array, Denoised


def log_step(schedule: Schedule, t: Array, s: Array) -> Array:
    """h = lambda_s - lambda_t: positive towards the image, and 0 where either end is pure noise or pure image."""
    h = 0.5 * (logsnr(schedule, s) - logsnr(schedule, t))
    return jnp.where(jnp.isfinite(h), h, 0.0).astype(jnp.result_type(float))


def between(schedule: Schedule, t: Array, h: Array, fraction: float) -> Array:
    """The time at lambda_t + fraction h."""
    return schedule.time(logsnr(schedule, t) + (2.0 * fraction * h).astype(t.dtype))


def ddim(schedule: Schedule, d: Denoised, s: Array) -> Array:
    """alpha_s x0 + sigma_s eps: what x becomes at s while x0 and eps stand still."""
    return over(schedule.alpha(s), d.x0) * d.x0 + over(schedule.sigma(s), d.eps) * d.eps


def exponential_moments(h: Array, count: int) -> Array:
    """f32[count], M_n = int_0^h e^(u - h) u^n du, by parts: M_0 = 1 - e^-h, M_n = h^n - n M_(n-1)."""
    moments = [-jnp.expm1(-h)]
    for n in range(1, count):
        moments.append(h**n - n * moments[-1])
    return jnp.stack(moments)
