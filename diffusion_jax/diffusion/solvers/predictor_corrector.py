"""Predictor and corrector (Song et al. 2021, algorithms 1 to 3), for any schedule."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from diffusion_jax import rng
from diffusion_jax.diffusion.broadcast import over
from diffusion_jax.diffusion.schedule import Schedule
from diffusion_jax.diffusion.solvers.base import pytree
from diffusion_jax.diffusion.solvers.euler_maruyama import EulerMaruyama
from diffusion_jax.types import Array, Denoiser


@pytree
@dataclass(frozen=True, kw_only=True)
class PredictorCorrector:
    """Euler-Maruyama's step to s, then `corrections` steps of Langevin dynamics at s, unless s is 0.

        x <- x + e score + sqrt(2 e) z = x - 2 snr^2 sigma eps + 2 snr sigma z,    e = 2 (snr sigma)^2

    The paper's e is 2 (snr |z| / |score|)^2. Norms averaged over the batch would let images see each other, and an
    image's own norms would make its step depend on x, which bends the law that Langevin dynamics keeps. For a true eps
    the ratio of the norms is about sigma; so it is taken to be sigma, as in annealed Langevin dynamics (Song & Ermon
    2019, algorithm 1). The paper's factor 1 - beta on e, next to 1 for small steps, is left out.
    """

    snr: float = 0.16
    corrections: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.snr, float) and not 0.0 < self.snr < 1.0:
            raise ValueError(f"snr must lie between 0 and 1, not {self.snr}")
        if self.corrections < 1:
            raise ValueError(f"corrections must be 1 or more, not {self.corrections}")

    def init(self, x: Array) -> tuple:  # noqa: D102
        return ()

    def step(  # noqa: D102
        self, denoise: Denoiser, schedule: Schedule, x: Array, t: Array, s: Array, carry: tuple, keys: Array
    ) -> tuple[Array, tuple]:
        x, _ = EulerMaruyama().step(denoise, schedule, x, t, s, (), rng.fold(keys, 0))
        sigma_s = over(schedule.sigma(s), x)

        def correct(j: Array, x: Array) -> Array:
            z = rng.normal(rng.fold(keys, j), x.shape[1:], x.dtype)
            return x - 2.0 * self.snr**2 * sigma_s * denoise(x, s).eps + 2.0 * self.snr * sigma_s * z

        count = jnp.where(s > 0.0, self.corrections, 0)
        return jax.lax.fori_loop(1, count + 1, correct, x), carry
