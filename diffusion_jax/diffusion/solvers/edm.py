"""EDM's stochastic sampler (Karras et al. 2022, algorithm 2), for any schedule."""

import math
from dataclasses import dataclass

import jax.numpy as jnp

from diffusion_jax.diffusion.broadcast import over
from diffusion_jax.diffusion.schedule import Schedule, logsnr
from diffusion_jax.diffusion.solvers.base import pytree
from diffusion_jax.diffusion.solvers.heun import Heun
from diffusion_jax.diffusion.solvers.kernel import forward_kernel, with_noise
from diffusion_jax.types import Array, Denoiser


@pytree
@dataclass(frozen=True, kw_only=True)
class EDMStochastic:
    """Noise is added up to (1 + churn) sigma / alpha, then a step of Heun's method leads from there to s.

    `churn` is the paper's gamma, the same in every step: their S_churn divided by the number of steps N. It is added
    where sigma / alpha lies in [s_min, s_max] and not beyond t = 1; its standard deviation is multiplied by `s_noise`.
    The defaults are the paper's for ImageNet-64 (Table 5: S_churn = 40, and N = 256). At churn = 0 this is Heun's
    method.
    """

    churn: float = 40.0 / 256.0
    s_min: float = 0.05
    s_max: float = 50.0
    s_noise: float = 1.003

    def __post_init__(self) -> None:
        if isinstance(self.churn, float) and not 0.0 <= self.churn <= math.sqrt(2.0) - 1.0:
            raise ValueError(f"churn must lie in [0, sqrt(2) - 1], not {self.churn}")
        if isinstance(self.s_min, float) and isinstance(self.s_max, float) and not 0.0 <= self.s_min <= self.s_max:
            raise ValueError(f"needs 0 <= s_min <= s_max, not {self.s_min} and {self.s_max}")
        if isinstance(self.s_noise, float) and not self.s_noise > 0.0:
            raise ValueError(f"s_noise must be positive, not {self.s_noise}")

    def init(self, x: Array) -> tuple:  # noqa: D102
        return ()

    def step(  # noqa: D102
        self, denoise: Denoiser, schedule: Schedule, x: Array, t: Array, s: Array, carry: tuple, keys: Array
    ) -> tuple[Array, tuple]:
        ratio = schedule.sigma(t) / schedule.alpha(t)
        churned = (self.churn > 0.0) & (ratio >= self.s_min) & (ratio <= self.s_max)
        higher = jnp.minimum(schedule.time(logsnr(schedule, t) - 2.0 * jnp.log1p(self.churn)), 1.0)
        higher = jnp.where(churned & (higher > t), higher, t)  # t to the bit where nothing is added
        a, r = forward_kernel(schedule, t, higher)
        noise = self.s_noise * schedule.sigma(higher) * jnp.sqrt(1.0 - r)
        x = with_noise(over(a, x) * x, noise, keys)
        return Heun().step(denoise, schedule, x, higher, s, carry, keys)
