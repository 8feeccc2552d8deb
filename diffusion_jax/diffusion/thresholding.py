"""Thresholds keep x0 within the range of images, where guidance of large weight drives it out.

A threshold changes x0; eps is then derived again. An eps that no longer belongs to x0 would push x off its path:

    x = alpha x0 + sigma eps        what x0 loses, eps gains: eps' = eps + alpha / sigma (x0 - x0').
"""

from dataclasses import dataclass
from typing import Protocol

import jax.numpy as jnp

from diffusion_jax.diffusion.broadcast import over
from diffusion_jax.diffusion.schedule import Schedule
from diffusion_jax.diffusion.solvers.base import pytree
from diffusion_jax.types import Array, Denoised, Denoiser


class Threshold(Protocol):
    """x0 f32[n,H,W,C] -> x0 within bounds, each image on its own. A pytree: its float options are leaves."""

    def __call__(self, x0: Array) -> Array: ...  # noqa: D102


@pytree
@dataclass(frozen=True, kw_only=True)
class NoThreshold:
    """x0 as it is."""

    def __call__(self, x0: Array) -> Array:  # noqa: D102
        return x0


@pytree
@dataclass(frozen=True, kw_only=True)
class Static:
    """Clip to [-bound, bound] (Ho et al. 2020, in their code; named so in Saharia et al. 2022, section 2.3)."""

    bound: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.bound, float) and not self.bound > 0.0:
            raise ValueError(f"bound must be positive, not {self.bound}")

    def __call__(self, x0: Array) -> Array:  # noqa: D102
        return jnp.clip(x0, -self.bound, self.bound)


@pytree
@dataclass(frozen=True, kw_only=True)
class Dynamic:
    """Clip to [-s, s] and divide by s, where s is a high quantile of an image's own |x0| (Saharia et al. 2022, 2.3).

    s is at least 1: an image within [-1, 1] stays as it is, one that leaves it is drawn together.
    """

    quantile: float = 0.995

    def __post_init__(self) -> None:
        if isinstance(self.quantile, float) and not 0.0 < self.quantile <= 1.0:
            raise ValueError(f"quantile must lie in (0, 1], not {self.quantile}")

    def __call__(self, x0: Array) -> Array:  # noqa: D102
        of_image = jnp.quantile(jnp.abs(x0), jnp.asarray(self.quantile, x0.dtype), axis=(1, 2, 3), keepdims=True)
        s = jnp.maximum(of_image, 1.0)
        return jnp.clip(x0, -s, s) / s


THRESHOLDS = {"none": NoThreshold, "static": Static, "dynamic": Dynamic}


def thresholded(denoise: Denoiser, schedule: Schedule, threshold: Threshold) -> Denoiser:
    """The denoiser with its x0 within bounds and its eps derived again, at times above 0."""

    def within(x: Array, t: Array) -> Denoised:
        d = denoise(x, t)
        return with_x0(d, threshold(d.x0), schedule.alpha(t), schedule.sigma(t))

    return within


def with_x0(d: Denoised, x0: Array, alpha: Array, sigma: Array) -> Denoised:
    """`d` with another x0 and the eps that belongs to it: alpha x0 + sigma eps stays. sigma is above 0."""
    return d._replace(x0=x0, eps=d.eps + over(alpha / sigma, x0) * (d.x0 - x0))
