"""Noise schedules: x_t = alpha(t) x0 + sigma(t) eps, t in [0, 1], data at 0, noise at 1.

A schedule states alpha, sigma, the time at which a given log signal-to-noise ratio is reached, and the label under
which a network is told the time. Derivatives come from `jax.jvp`; there is nothing else to a schedule.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp

from diffusion_jax.types import Array


class Schedule(Protocol):
    """The interface. All methods are elementwise: t in [0, 1], of any shape."""

    def alpha(self, t: Array) -> Array:
        """Scale of the data in x_t."""
        ...

    def sigma(self, t: Array) -> Array:
        """Standard deviation of the noise in x_t; 0 at t = 0."""
        ...

    def time(self, logsnr: Array) -> Array:
        """The t at which log(alpha^2 / sigma^2) equals `logsnr`."""
        ...

    def label(self, t: Array) -> Array:
        """What the network is given for t, of order 1: t itself, or EDM's c_noise."""
        ...


def logsnr(schedule: Schedule, t: Array) -> Array:
    """log(alpha^2 / sigma^2): +inf at t = 0, decreasing."""
    return 2.0 * (jnp.log(schedule.alpha(t)) - jnp.log(schedule.sigma(t)))


def first_time(schedule: Schedule) -> Array:
    """f32[]: where sigma / alpha is 1/1000. Training looks at no smaller time: the image is there already."""
    return schedule.time(jnp.float32(2.0 * math.log(1000.0)))


def with_derivatives(schedule: Schedule, t: Array) -> tuple[Array, Array, Array, Array]:
    """(alpha, sigma, alpha', sigma') at t, the derivatives with respect to t."""
    one = jnp.ones_like(t)
    alpha, d_alpha = jax.jvp(schedule.alpha, (t,), (one,))
    sigma, d_sigma = jax.jvp(schedule.sigma, (t,), (one,))
    return alpha, sigma, d_alpha, d_sigma


@dataclass(frozen=True, kw_only=True)
class VPLinear:
    """Variance preserving with linear beta(t) (Ho et al. 2020 in the continuous form of Song et al. 2021, eq. 32-33).

    log alpha = -t^2 (beta_max - beta_min) / 4 - t beta_min / 2, sigma^2 = 1 - alpha^2.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        if not 0.0 < self.beta_min < self.beta_max:
            raise ValueError(f"0 < beta_min < beta_max must hold, not {self.beta_min} and {self.beta_max}")

    def _log_alpha(self, t: Array) -> Array:
        return -0.25 * t**2 * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min

    def alpha(self, t: Array) -> Array:  # noqa: D102
        return jnp.exp(self._log_alpha(t))

    def sigma(self, t: Array) -> Array:  # noqa: D102
        return jnp.sqrt(-jnp.expm1(2.0 * self._log_alpha(t)))

    def time(self, logsnr: Array) -> Array:  # noqa: D102
        # alpha^2 = sigmoid(logsnr) is a quadratic equation in t; this form of its root does not cancel near t = 0.
        twice = 2.0 * jax.nn.softplus(-logsnr)
        slope = self.beta_max - self.beta_min
        return twice / (self.beta_min + jnp.sqrt(self.beta_min**2 + slope * twice))

    def label(self, t: Array) -> Array:  # noqa: D102
        return t


@dataclass(frozen=True, kw_only=True)
class Cosine:
    """alpha = cos(theta t), sigma = sin(theta t) (Nichol & Dhariwal 2021, eq. 17, without their offset s).

    theta stops short of pi/2, where tan(theta) = exp(-logsnr_min / 2): the end keeps a trace of signal, as their
    clipping of beta at 0.999 does (logsnr -19.8), so that a network may predict the noise there.
    """

    logsnr_min: float = -20.0

    def __post_init__(self) -> None:
        if not self.logsnr_min < 0.0:
            raise ValueError(f"logsnr_min must be negative, not {self.logsnr_min}")

    @property
    def _theta(self) -> float:
        return math.atan(math.exp(-0.5 * self.logsnr_min))

    def alpha(self, t: Array) -> Array:  # noqa: D102
        return jnp.cos(self._theta * t)

    def sigma(self, t: Array) -> Array:  # noqa: D102
        return jnp.sin(self._theta * t)

    def time(self, logsnr: Array) -> Array:  # noqa: D102
        return jnp.arctan(jnp.exp(-0.5 * logsnr)) / self._theta

    def label(self, t: Array) -> Array:  # noqa: D102
        return t


@dataclass(frozen=True, kw_only=True)
class EDM:
    """alpha = 1, sigma = sigma_max t (Karras et al. 2022, Table 1): noise is added and the data never shrinks."""

    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        if not self.sigma_max > 0.0:
            raise ValueError(f"sigma_max must be positive, not {self.sigma_max}")

    def alpha(self, t: Array) -> Array:  # noqa: D102
        return jnp.ones_like(t)

    def sigma(self, t: Array) -> Array:  # noqa: D102
        return self.sigma_max * t

    def time(self, logsnr: Array) -> Array:  # noqa: D102
        return jnp.exp(-0.5 * logsnr) / self.sigma_max

    def label(self, t: Array) -> Array:
        """c_noise = ln(sigma) / 4 (Karras et al. 2022, Table 1)."""
        return 0.25 * jnp.log(self.sigma(t))


@dataclass(frozen=True, kw_only=True)
class RectifiedFlow:
    """alpha = 1 - t, sigma = t: straight lines from data to noise (Liu et al. 2022; Lipman et al. 2022)."""

    def alpha(self, t: Array) -> Array:  # noqa: D102
        return 1.0 - t

    def sigma(self, t: Array) -> Array:  # noqa: D102
        return t

    def time(self, logsnr: Array) -> Array:  # noqa: D102
        return jax.nn.sigmoid(-0.5 * logsnr)

    def label(self, t: Array) -> Array:  # noqa: D102
        return t


SCHEDULES = {"vp_linear": VPLinear, "cosine": Cosine, "edm": EDM, "rectified_flow": RectifiedFlow}
