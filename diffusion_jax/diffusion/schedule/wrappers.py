"""Schedules made from another one: shifted in log-SNR, or in time, or stretched to end without signal."""

import math
from dataclasses import dataclass

import jax
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

    def __post_init__(self) -> None:
        if not -20.0 <= self.logsnr <= 20.0:
            raise ValueError(f"logsnr must lie in [-20, 20], not be {self.logsnr}")

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
        check_shift(self.shift)

    def alpha(self, t: Array) -> Array:  # noqa: D102
        return self.of.alpha(shift_time(t, self.shift))

    def sigma(self, t: Array) -> Array:  # noqa: D102
        return self.of.sigma(shift_time(t, self.shift))

    def time(self, logsnr: Array) -> Array:  # noqa: D102
        return shift_time(self.of.time(logsnr), 1.0 / self.shift)

    def label(self, t: Array) -> Array:
        """That of the shifted time: a network means the same noise by it with or without the shift."""
        return self.of.label(shift_time(t, self.shift))


def check_shift(shift: float) -> None:
    """Raise `ValueError` where float32 does not tell the shifted times apart."""
    if not 1e-3 <= shift <= 1e3:
        raise ValueError(f"shift must lie in [0.001, 1000], not be {shift}")


def shift_time(t: Array, shift: float) -> Array:
    """s t / (1 + (s - 1) t), as t / (t + (1 - t) / s), which is exactly 1 at t = 1; its inverse has 1 / s."""
    return t / (t + (1.0 - t) / shift)


@dataclass(frozen=True, kw_only=True)
class ZeroTerminalLimit:
    """`of`, moved and stretched to end in alpha = 0 (Lin et al. 2023, algorithm 1, in the limit of many steps).

        alpha <- (alpha - alpha(1)) / (1 - alpha(1)),        sigma^2 = 1 - alpha^2

    The first of many steps has alpha_1 = 1. `of` preserves variance and is continuous; `discrete.ZeroTerminalSNR` is
    for steps.
    """

    of: Schedule

    def _end(self, t: Array) -> Array:
        """alpha(1) of `of`."""
        return self.of.alpha(jnp.ones_like(t))

    def alpha(self, t: Array) -> Array:  # noqa: D102
        end = self._end(t)
        rest = self.of.alpha(t) - end
        # Rounding may leave less than nothing at t = 1, where the slope must stay what it is.
        rest = rest + jax.lax.stop_gradient(jnp.maximum(-rest, 0.0))
        return rest / (1.0 - end)

    def sigma(self, t: Array) -> Array:  # noqa: D102
        # 1 - alpha = (1 - alpha_of) / (1 - alpha_of(1)) and 1 - alpha_of = sigma_of^2 / (1 + alpha_of)
        stretch = (1.0 + self.alpha(t)) / ((1.0 + self.of.alpha(t)) * (1.0 - self._end(t)))
        return self.of.sigma(t) * jnp.sqrt(stretch)

    def time(self, logsnr: Array) -> Array:
        """`of` is asked for the log-SNR that it has there: 1 - alpha^2 = (1 - alpha) (1 + alpha)."""
        end, alpha = self._end(logsnr), jnp.sqrt(jax.nn.sigmoid(logsnr))
        lost = jax.nn.sigmoid(-logsnr) / (1.0 + alpha) * (1.0 - end)
        alpha = end + (1.0 - end) * alpha
        return self.of.time(2.0 * jnp.log(alpha) - jnp.log(lost) - jnp.log1p(alpha))

    def label(self, t: Array) -> Array:  # noqa: D102
        return self.of.label(t)
