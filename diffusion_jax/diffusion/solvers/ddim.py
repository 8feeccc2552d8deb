"""DDIM (Song, Meng & Ermon 2021, eq. 12 and 16), for any schedule."""

from dataclasses import dataclass

import jax.numpy as jnp

from diffusion_jax.diffusion.broadcast import over
from diffusion_jax.diffusion.schedule import Schedule
from diffusion_jax.diffusion.solvers.base import pytree
from diffusion_jax.diffusion.solvers.kernel import with_noise
from diffusion_jax.types import Array, Denoiser


@pytree
@dataclass(frozen=True, kw_only=True)
class DDIM:
    """x_s = alpha_s x0 + sqrt(sigma_s^2 - noise^2) eps + noise z, of order 1.

    noise = eta sigma_s sqrt(1 - SNR_t / SNR_s), the posterior's standard deviation at eta = 1: eta = 0 is the
    deterministic DDIM, eta = 1 is DDPM's ancestral sampling. No noise is drawn where eta is 0.
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.eta, float) and not 0.0 <= self.eta <= 1.0:
            raise ValueError(f"eta must lie in [0, 1], not {self.eta}")

    def init(self, x: Array) -> tuple:  # noqa: D102
        return ()

    def step(  # noqa: D102
        self, denoise: Denoiser, schedule: Schedule, x: Array, t: Array, s: Array, carry: tuple, keys: Array
    ) -> tuple[Array, tuple]:
        d = denoise(x, t)
        sigma_s = schedule.sigma(s)
        snr_ratio = (schedule.alpha(t) * sigma_s / (schedule.alpha(s) * schedule.sigma(t))) ** 2
        noise = self.eta * sigma_s * jnp.sqrt(jnp.maximum(1.0 - snr_ratio, 0.0))
        # sqrt(sigma_s^2 - noise^2), written so that it neither cancels nor rounds to below 0 where alpha_t is next to 0
        kept = sigma_s * jnp.sqrt(1.0 - self.eta**2 + self.eta**2 * jnp.minimum(snr_ratio, 1.0))
        x = over(schedule.alpha(s), x) * d.x0 + over(kept, x) * d.eps
        return with_noise(x, noise, keys), carry
