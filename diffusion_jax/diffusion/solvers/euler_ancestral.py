"""Euler's method with ancestral noise (Crowson 2022, k-diffusion's `sample_euler_ancestral`), for any schedule."""

from dataclasses import dataclass

import jax.numpy as jnp

from diffusion_jax.diffusion.broadcast import over
from diffusion_jax.diffusion.schedule import Schedule
from diffusion_jax.diffusion.solvers.base import pytree
from diffusion_jax.diffusion.solvers.euler import Euler
from diffusion_jax.diffusion.solvers.kernel import forward_kernel, with_noise
from diffusion_jax.types import Array, Denoised, Denoiser


@pytree
@dataclass(frozen=True, kw_only=True)
class EulerAncestral:
    """Euler's step on to a noise level `down` below sigma_s, then fresh noise up to sigma_s.

        up = sigma_s min(1, eta sqrt(1 - r)),    down = sqrt(sigma_s^2 - up^2)        (r of `kernel`)

    In exact arithmetic this is DDIM with the same eta, as Euler's method is DDIM at eta = 0; it is a row of its own
    because its name is in use, with full noise as its default, and because eta may exceed 1.
    """

    eta: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.eta, float) and not self.eta >= 0.0:
            raise ValueError(f"eta must be 0 or more, not {self.eta}")

    def init(self, x: Array) -> tuple:  # noqa: D102
        return ()

    def step(  # noqa: D102
        self, denoise: Denoiser, schedule: Schedule, x: Array, t: Array, s: Array, carry: tuple, keys: Array
    ) -> tuple[Array, tuple]:
        d: Denoised = denoise(x, t)
        x, _ = Euler().step(lambda x, t: d, schedule, x, t, s, (), keys)
        sigma_s, (_, r) = schedule.sigma(s), forward_kernel(schedule, s, t)
        up = sigma_s * jnp.minimum(1.0, self.eta * jnp.sqrt(1.0 - r))
        # sqrt(sigma_s^2 - up^2), written so that it does not cancel at eta = 1
        down = sigma_s * jnp.sqrt(jnp.maximum(0.0, 1.0 - self.eta**2 + self.eta**2 * r))
        # Euler's step has arrived at alpha_s x0 + sigma_s eps: the eps in it falls to `down`
        x = x + over(down - sigma_s, x) * d.eps
        return with_noise(x, up, keys), carry
