"""DDPM's ancestral sampling (Ho et al. 2020, algorithm 2), for any schedule."""

import math
from dataclasses import dataclass

import jax.numpy as jnp

from diffusion_jax.diffusion.broadcast import over
from diffusion_jax.diffusion.schedule import Schedule
from diffusion_jax.diffusion.solvers.base import pytree
from diffusion_jax.diffusion.solvers.kernel import forward_kernel, with_noise
from diffusion_jax.types import Array, Denoiser


@pytree
@dataclass(frozen=True, kw_only=True)
class DDPM:
    """x_s = alpha_s x0 + sqrt(r) sigma_s eps + noise z: the mean of q(x_s | x_t, x0) and noise, but none at s = 0.

    With r of `kernel`, Ho et al. 2020 (section 3.2) leave two choices for noise^2: the posterior's variance,
    sigma_s^2 (1 - r), right for data that is one point, and the forward kernel's, sigma_t^2 (1 - r), their beta, right
    for white data. `variance` v interpolates their logarithms (Nichol & Dhariwal 2021, eq. 15),

        noise = sqrt(1 - r) sigma_s^(1-v) sigma_t^v.

    v = 0 is DDIM with eta = 1. Left out (not a number), v is what the model has learned, `Denoised.spread`, pixel by
    pixel, and 0 where it has learned none.
    """

    variance: float = math.nan

    def __post_init__(self) -> None:
        if isinstance(self.variance, float) and not (math.isnan(self.variance) or 0.0 <= self.variance <= 1.0):
            raise ValueError(f"variance must lie in [0, 1], not {self.variance}")

    def init(self, x: Array) -> tuple:  # noqa: D102
        return ()

    def step(  # noqa: D102
        self, denoise: Denoiser, schedule: Schedule, x: Array, t: Array, s: Array, carry: tuple, keys: Array
    ) -> tuple[Array, tuple]:
        d = denoise(x, t)
        sigma_t, sigma_s = over(schedule.sigma(t), x), over(schedule.sigma(s), x)
        _, r = forward_kernel(schedule, s, t)
        mean = over(schedule.alpha(s), x) * d.x0 + over(jnp.sqrt(r), x) * sigma_s * d.eps
        v = jnp.where(jnp.isnan(self.variance), 0.0 if d.spread is None else d.spread, self.variance).astype(x.dtype)
        noise = jnp.where(s > 0.0, over(jnp.sqrt(1.0 - r), x) * sigma_s ** (1.0 - v) * sigma_t**v, 0.0)
        return with_noise(mean, noise, keys), carry
