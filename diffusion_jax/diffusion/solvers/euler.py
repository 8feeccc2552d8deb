"""Euler's method on the probability-flow ODE in t: dx/dt = alpha' x0 + sigma' eps (Song et al. 2021, eq. 13)."""

from dataclasses import dataclass

from diffusion_jax.diffusion.broadcast import over
from diffusion_jax.diffusion.schedule import Schedule, with_derivatives
from diffusion_jax.diffusion.solvers.base import pytree
from diffusion_jax.types import Array, Denoiser


def slope(denoise: Denoiser, schedule: Schedule, x: Array, t: Array) -> Array:
    """dx/dt at (x, t), t above 0."""
    x0, eps = denoise(x, t)
    _, _, d_alpha, d_sigma = with_derivatives(schedule, t)
    return over(d_alpha, x) * x0 + over(d_sigma, x) * eps


@pytree
@dataclass(frozen=True, kw_only=True)
class Euler:
    """x_s = x_t + (s - t) dx/dt, of order 1."""

    def init(self, x: Array) -> tuple:  # noqa: D102
        return ()

    def step(  # noqa: D102
        self, denoise: Denoiser, schedule: Schedule, x: Array, t: Array, s: Array, carry: tuple, keys: Array
    ) -> tuple[Array, tuple]:
        return x + over(s - t, x) * slope(denoise, schedule, x, t), carry
