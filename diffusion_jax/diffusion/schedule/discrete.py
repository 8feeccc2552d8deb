"""Schedules that are stated as T numbers: the papers' discrete steps, made continuous in t.

Step k of T is t = k / T, and alpha_k = prod_{i <= k} (1 - beta_i)^(1/2). There x_t is exactly the paper's. Between two
steps, and from alpha = 1 at t = 0 to the first, alpha is linear in t; sigma^2 = 1 - alpha^2. (Log alpha would do as
well, but a schedule may end in alpha = 0.)
"""

import functools
from abc import ABC, abstractmethod
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.types import Array

MOST_STEPS = 1_000_000
"""The most steps of a discrete process: float32 tells times that are 1e-6 apart from each other, and hardly less."""


class Discrete(ABC):
    """What the schedules of this file share; each of them states `alphas`."""

    @abstractmethod
    def alphas(self) -> np.ndarray:
        """(alpha_1, ..., alpha_T), f64[T], falling from below 1 to 0 or more."""

    @functools.cached_property
    def _table(self) -> tuple[np.ndarray, np.ndarray]:
        """(t, alpha) at the steps 0 to T."""
        alphas = np.append(1.0, self.alphas())
        return np.arange(len(alphas)) / (len(alphas) - 1), alphas

    def alpha(self, t: Array) -> Array:
        """Linear between the steps."""
        times, alphas = self._table
        return _interpolate(t, times, alphas)

    def sigma(self, t: Array) -> Array:
        """sigma^2 = (1 - alpha) (1 + alpha), from a table of 1 - alpha: near t = 0 the difference would lose digits."""
        times, alphas = self._table
        lost = _interpolate(t, times, 1.0 - alphas)
        return jnp.sqrt(lost * (2.0 - lost))

    def time(self, logsnr: Array) -> Array:
        """Alpha is linear in t, so t is linear in alpha, or in 1 - alpha where that has more digits."""
        times, alphas = self._table
        alpha = jnp.sqrt(jax.nn.sigmoid(logsnr))
        lost = jax.nn.sigmoid(-logsnr) / (1.0 + alpha)
        near, far = _interpolate(lost, 1.0 - alphas, times), _interpolate(-alpha, -alphas, times)
        return jnp.where(logsnr > 0.0, near, far)

    def label(self, t: Array) -> Array:
        """The time t; a network that was trained on the numbers k = 0 .. T - 1 expects T t - 1."""
        return t


def _interpolate(x: Array, nodes: np.ndarray, values: np.ndarray) -> Array:
    """Piecewise linear, from tables in float64, in x's dtype."""
    return jnp.interp(x, jnp.asarray(nodes, x.dtype), jnp.asarray(values, x.dtype))


def check_steps(steps: int) -> None:
    """Raise `ValueError` unless a discrete process may have as many."""
    if not 2 <= steps <= MOST_STEPS:
        raise ValueError(f"steps must lie in [2, {MOST_STEPS}], not be {steps}")


def _alphas(betas: np.ndarray) -> np.ndarray:
    return np.sqrt(np.cumprod(1.0 - betas))


@dataclass(frozen=True, kw_only=True)
class _ScaledBetas(Discrete):
    """Betas that are stated for 1,000 steps; with T steps they are 1000 / T times as large.

    So the sum of all betas, and nearly the noise at the end, is the same for any T (the released code of Nichol &
    Dhariwal 2021, who take T = 4,000). Below some T the largest one would reach 1: that is refused.
    """

    beta_min: float
    beta_max: float
    steps: int = 1000

    def __post_init__(self) -> None:
        check_steps(self.steps)
        if not self.beta_max * self._scale < 1.0:
            raise ValueError(f"1000 / steps times beta_max must stay below 1, not be {self.beta_max * self._scale:.3g}")
        # Beyond a beta_max of 0.25 float32 has no alpha left at the end of many steps.
        if not 1e-9 <= self.beta_min < self.beta_max <= 0.25:
            raise ValueError(f"1e-9 <= beta_min < beta_max <= 0.25 must hold, not {self.beta_min} and {self.beta_max}")

    @property
    def _scale(self) -> float:
        return 1000.0 / self.steps


@dataclass(frozen=True, kw_only=True)
class DDPMLinear(_ScaledBetas):
    """beta_k linear in k (Ho et al. 2020, section 4). `vp_linear` is its limit of many steps."""

    beta_min: float = 1e-4
    beta_max: float = 0.02

    def alphas(self) -> np.ndarray:  # noqa: D102
        return _alphas(self._scale * np.linspace(self.beta_min, self.beta_max, self.steps))


@dataclass(frozen=True, kw_only=True)
class ScaledLinear(_ScaledBetas):
    """beta_k^(1/2) linear in k (Rombach et al. 2022, and with these numbers Stable Diffusion)."""

    beta_min: float = 0.00085
    beta_max: float = 0.012

    def alphas(self) -> np.ndarray:  # noqa: D102
        return _alphas(self._scale * np.linspace(self.beta_min**0.5, self.beta_max**0.5, self.steps) ** 2)


@dataclass(frozen=True, kw_only=True)
class CosineDiscrete(Discrete):
    """beta_k = min(1 - f(k) / f(k - 1), beta_max), f(k) = cos(pi/2 (k/T + s) / (1 + s))^2.

    Nichol & Dhariwal 2021, eq. 17 and the text below it.
    """

    offset: float = 0.008
    beta_max: float = 0.999
    steps: int = 1000

    def __post_init__(self) -> None:
        check_steps(self.steps)
        if not (0.0 <= self.offset <= 1.0 and 1e-6 <= self.beta_max < 1.0):
            raise ValueError(f"offset must lie in [0, 1] and beta_max in [1e-6, 1), not {self.offset}, {self.beta_max}")

    def alphas(self) -> np.ndarray:  # noqa: D102
        k = np.arange(self.steps + 1)
        f = np.cos(np.pi / 2 * (k / self.steps + self.offset) / (1.0 + self.offset)) ** 2
        return _alphas(np.minimum(1.0 - f[1:] / f[:-1], self.beta_max))


@dataclass(frozen=True, kw_only=True)
class ZeroTerminalSNR(Discrete):
    """The steps of another schedule, moved and stretched to end in alpha_T = 0 (Lin et al. 2023, algorithm 1).

    alpha_k <- (alpha_k - alpha_T) alpha_1 / (alpha_1 - alpha_T): the first step stays as it is.
    """

    of: Discrete

    def alphas(self) -> np.ndarray:  # noqa: D102
        alphas = self.of.alphas()
        return (alphas - alphas[-1]) * alphas[0] / (alphas[0] - alphas[-1])
