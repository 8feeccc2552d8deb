"""Schedules that are stated as functions of t: variance preserving, variance exploding, straight."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from diffusion_jax.types import Array


@dataclass(frozen=True, kw_only=True)
class VPLinear:
    """The VP-SDE: linear beta(t) (Song et al. 2021, eq. 32-33; the continuous form of Ho et al. 2020).

    log alpha = -t^2 (beta_max - beta_min) / 4 - t beta_min / 2, sigma^2 = 1 - alpha^2.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        # Beyond a beta_max of 300 float32 has no alpha left at t = 1.
        if not 1e-6 <= self.beta_min < self.beta_max <= 300.0:
            raise ValueError(f"1e-6 <= beta_min < beta_max <= 300 must hold, not {self.beta_min} and {self.beta_max}")

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
    clipping of beta at 0.999 does (logsnr -19.8), so that a network may predict the noise there. `gvp` has none left.
    """

    logsnr_min: float = -20.0

    def __post_init__(self) -> None:
        if not self.logsnr_min < 0.0:
            raise ValueError(f"logsnr_min must be negative, not {self.logsnr_min}")

    @property
    def _rest(self) -> float:
        """pi/2 - theta."""
        return math.atan(math.exp(0.5 * self.logsnr_min))

    @property
    def _theta(self) -> float:
        return 0.5 * math.pi - self._rest

    def alpha(self, t: Array) -> Array:  # noqa: D102
        # cos(theta t) as a sine that counts from the end: exact where alpha is small, and 0 where theta is pi/2.
        return jnp.sin(self._rest + self._theta * (1.0 - t))

    def sigma(self, t: Array) -> Array:  # noqa: D102
        return jnp.sin(self._theta * t)

    def time(self, logsnr: Array) -> Array:  # noqa: D102
        return jnp.arctan(jnp.exp(-0.5 * logsnr)) / self._theta

    def label(self, t: Array) -> Array:  # noqa: D102
        return t


def gvp() -> Cosine:
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2): cosine down to alpha = 0 (Albergo et al. 2023; Ma et al. 2024)."""
    return Cosine(logsnr_min=-math.inf)


@dataclass(frozen=True, kw_only=True)
class Sigmoid:
    """alpha^2 falls along a piece of the logistic function (Jabri et al. 2022; Chen 2023, section 2.2, algorithm 1).

    With S(t) = sigmoid((start + t (end - start)) / tau) the fall is p = (S(1) - S(t)) / (S(1) - S(0)), and

        alpha^2 = gamma_min + (1 - gamma_min) p,        sigma^2 = 1 - alpha^2.

    The papers clip p at gamma_min = 1e-9 instead; that differs by less than 1e-9 and is not invertible at the end.
    """

    start: float = -3.0
    end: float = 3.0
    tau: float = 1.0
    gamma_min: float = 1e-9

    def __post_init__(self) -> None:
        if not (self.tau > 0.0 and 0.0 <= self.gamma_min < 1.0):
            raise ValueError(f"tau > 0 and 0 <= gamma_min < 1 must hold, not {self.tau} and {self.gamma_min}")
        a, b = self._ends
        if not (-80.0 <= a < b <= 80.0 and b - a >= 1e-6):  # float32 has exp(80), and not exp(90)
            raise ValueError(f"start / tau must lie below end / tau, by 1e-6, both in [-80, 80], not be {a} and {b}")

    @property
    def _ends(self) -> tuple[float, float]:
        """The ends of the piece, start / tau and end / tau."""
        return self.start / self.tau, self.end / self.tau

    def alpha(self, t: Array) -> Array:  # noqa: D102
        a, b = self._ends  # counted from the end, where 1 - sigmoid(y) = sigmoid(-y)
        return jnp.sqrt(self.gamma_min + (1.0 - self.gamma_min) * _risen((b - a) * (1.0 - t), -b, -a))

    def sigma(self, t: Array) -> Array:  # noqa: D102
        a, b = self._ends
        return jnp.sqrt((1.0 - self.gamma_min) * _risen((b - a) * t, a, b))

    def time(self, logsnr: Array) -> Array:  # noqa: D102
        a, b = self._ends
        noise = jax.nn.sigmoid(-logsnr) / (1.0 - self.gamma_min)
        signal = (jax.nn.sigmoid(logsnr) - self.gamma_min) / (1.0 - self.gamma_min)
        from_start = _rise(jnp.minimum(noise, 0.5), a, b) / (b - a)
        from_end = _rise(jnp.clip(signal, 0.0, 0.5), -b, -a) / (b - a)
        return jnp.where(noise < 0.5, from_start, 1.0 - from_end)

    def label(self, t: Array) -> Array:  # noqa: D102
        return t


def _risen(x: Array, a: float, b: float) -> Array:
    """(S(a + x) - S(a)) / (S(b) - S(a)) for S = sigmoid, by S(y) - S(z) = sinh((y-z)/2) / (2 cosh(y/2) cosh(z/2)).

    Without the difference of two nearly equal numbers, it is exact at both ends.
    """
    return jnp.sinh(x / 2) * (math.cosh(b / 2) / math.sinh((b - a) / 2)) / jnp.cosh((a + x) / 2)


def _rise(share: Array, a: float, b: float) -> Array:
    """The x where `_risen` is `share`: sinh(x/2) = r cosh((a+x)/2), so e^x = (1 + r e^(-a/2)) / (1 - r e^(a/2))."""
    r = share * (math.sinh((b - a) / 2) / math.cosh(b / 2))
    return jnp.log1p(r * math.exp(-a / 2)) - jnp.log1p(-r * math.exp(a / 2))


@dataclass(frozen=True, kw_only=True)
class VE:
    """The VE-SDE: alpha = 1, sigma^2 = s(t)^2 - s(0)^2, s(t) = sigma_min (sigma_max / sigma_min)^t.

    Song et al. 2021, eq. 29 and 31. Most programs use s(t) itself, whose noise does not vanish at t = 0; the difference
    is what the SDE adds to the data, and the data are at t = 0.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def __post_init__(self) -> None:
        if not 1e-6 <= self.sigma_min < self.sigma_max <= 1e6:  # float32 has (sigma_max / sigma_min)^2
            low, high = self.sigma_min, self.sigma_max
            raise ValueError(f"1e-6 <= sigma_min < sigma_max <= 1e6 must hold, not {low} and {high}")

    @property
    def _rate(self) -> float:
        return 2.0 * math.log(self.sigma_max / self.sigma_min)

    def alpha(self, t: Array) -> Array:  # noqa: D102
        return jnp.ones_like(t)

    def sigma(self, t: Array) -> Array:  # noqa: D102
        return self.sigma_min * jnp.sqrt(jnp.expm1(self._rate * t))

    def time(self, logsnr: Array) -> Array:  # noqa: D102
        return jnp.log1p(jnp.exp(-logsnr) / self.sigma_min**2) / self._rate

    def label(self, t: Array) -> Array:
        """The time t: but for the very start, ln(sigma) is linear in it."""
        return t


@dataclass(frozen=True, kw_only=True)
class EDM:
    """alpha = 1, sigma = sigma_max t (Karras et al. 2022, Table 1): noise is added and the data never shrinks."""

    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        if not 1e-6 <= self.sigma_max <= 1e6:
            raise ValueError(f"sigma_max must lie in [1e-6, 1e6], not be {self.sigma_max}")

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
