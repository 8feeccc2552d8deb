"""Schedules made from another one: shifted in log-SNR, or in time."""

import math
from dataclasses import dataclass

import jax.numpy as jnp

from diffusion_jax.diffusion.schedule.base import Schedule
from diffusion_jax.types import Array


@dataclass(frozen=True, kw_only=True)
class Shifted:
    """The log-SNR of `of` plus `logsnr`, variance preserving (Hoogeboom et al. 2023, section 3.1).

    A picture of d pixels a side, averaged down to 64, has the log-SNR of `of` where the shift is 2 ln(64 / d).
    """

    of: Schedule
    logsnr: float

    def _parts(self, t: Array) -> tuple[Array, Array]:
        """alpha and sigma up to a common factor."""
        return self.of.alpha(t) * math.exp(self.logsnr / 4), self.of.sigma(t) * math.exp(-self.logsnr / 4)

    def alpha(self, t: Array) -> Array:  # noqa: D102
        alpha, sigma = self._parts(t)
        return alpha / jnp.hypot(alpha, sigma)

    def sigma(self, t: Array) -> Array:  # noqa: D102
        alpha, sigma = self._parts(t)
        return sigma / jnp.hypot(alpha, sigma)

    def time(self, logsnr: Array) -> Array:  # noqa: D102
        return self.of.time(logsnr - self.logsnr)

    def label(self, t: Array) -> Array:  # noqa: D102
        return self.of.label(t)


@dataclass(frozen=True, kw_only=True)
class ResolutionShifted:
    """`of` at the time s t / (1 + (s - 1) t) (Esser et al. 2024, eq. 23, s = (m / n)^(1/2) for m against n pixels).

    For rectified flow that is a shift of the log-SNR by -2 ln(s).
    """

    of: Schedule
    shift: float

    def __post_init__(self) -> None:
        if not self.shift > 0.0:
            raise ValueError(f"shift must be positive, not {self.shift}")

    def alpha(self, t: Array) -> Array:  # noqa: D102
        return self.of.alpha(shift_time(t, self.shift))

    def sigma(self, t: Array) -> Array:  # noqa: D102
        return self.of.sigma(shift_time(t, self.shift))

    def time(self, logsnr: Array) -> Array:  # noqa: D102
        return shift_time(self.of.time(logsnr), 1.0 / self.shift)

    def label(self, t: Array) -> Array:
        """That of the shifted time: a network means the same noise by it with or without the shift."""
        return self.of.label(shift_time(t, self.shift))


def shift_time(t: Array, shift: float) -> Array:
    """s t / (1 + (s - 1) t), as t / (t + (1 - t) / s), which is exactly 1 at t = 1; its inverse has 1 / s."""
    return t / (t + (1.0 - t) / shift)
