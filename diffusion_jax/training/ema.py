"""Averages of the weights: rules for the decay of step n (1 at the first update)."""

from dataclasses import dataclass
from typing import Protocol

import jax.numpy as jnp
import numpy as np

from diffusion_jax import plugs
from diffusion_jax.settings import TrainSettings
from diffusion_jax.types import Array


class Rule(Protocol):
    """(step f32[], 1 at the first update) -> f32[] in [0, 1]: ema <- decay ema + (1 - decay) params."""

    def __call__(self, step: Array) -> Array: ...  # noqa: D102


def constant(decay: float = 0.9999) -> Rule:
    """The same decay at every step."""
    _check(decay)
    return lambda step: jnp.float32(decay)


def warmup(decay: float = 0.9999) -> Rule:
    """min(decay, (1 + n) / (10 + n)): the start, far from the end, is forgotten (TensorFlow's moving averages)."""
    _check(decay)
    return lambda step: jnp.minimum(jnp.float32(decay), (1.0 + step) / (10.0 + step))


@dataclass(frozen=True, kw_only=True)
class Power:
    """beta(n) = (1 - 1/n)^(gamma + 1): the weights of update m count as m^gamma (Karras et al. 2024, eq. 1 to 3).

    The profile keeps its shape as training goes on, and the initial weights are forgotten at the first update. Several
    of them, kept in checkpoints, make up any other afterwards: see `training.posthoc`.

    Attributes:
      std: the profile's standard deviation over the length of training, in (0, 1/sqrt(12)]; 0.289 averages all
        updates alike.
    """

    std: float = 0.05

    def __post_init__(self) -> None:
        if not 0.0 < self.std <= 12.0**-0.5:
            raise ValueError(f"std must lie in (0, 0.2886], not {self.std}")

    @property
    def gamma(self) -> float:
        """The exponent."""
        return power_gamma(self.std)

    def __call__(self, step: Array) -> Array:
        """The decay; log1p keeps the digits that 1 - 1/n would lose in float32."""
        return jnp.exp(jnp.float32(self.gamma + 1.0) * jnp.log1p(-1.0 / step))


def power_gamma(std: float) -> float:
    """The exponent gamma of the power profile whose relative standard deviation is `std`, in (0, 1/sqrt(12)].

    std^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), the variance of the density (gamma + 1) tau^gamma on [0, 1];
    as a cubic, gamma^3 + 7 gamma^2 + (16 - std^-2) gamma + 12 - std^-2 = 0 (Karras et al. 2024, appendix C, algorithm
    2), whose largest root is meant.
    """
    return float(np.roots([1.0, 7.0, 16.0 - std**-2, 12.0 - std**-2]).real.max())


def _check(decay: float) -> None:
    if not 0.0 <= decay < 1.0:
        raise ValueError(f"decay must lie in [0, 1), not {decay}")


RULES = {"constant": constant, "warmup": warmup, "power": Power}


def averaging_rules(train: TrainSettings) -> dict[str, Rule]:
    """The averaging profiles of a config.

    Raises:
      UserError: for an unknown rule or option.
    """
    return {name: plugs.build(f"train.ema.{name}", text, RULES) for name, text in train.ema.items()}
