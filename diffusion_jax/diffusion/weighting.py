"""Loss weights, as functions of alpha and sigma that multiply the squared error of x0.

The loss is taken on the network's output y, of which x0's error is sigma / D times; so a weight w on x0 is
w sigma^2 / D^2 on y. `simple` is the exception that the papers make: the plain squared error of y, whatever y is.
All of them estimate the same model and differ in emphasis only (Kingma & Gao 2023, Table 1).
"""

from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp

from diffusion_jax.diffusion.prediction import Prediction
from diffusion_jax.types import Array


class Weighting(Protocol):
    """(prediction, t) -> the weight on the squared error of y, of t's shape."""

    def __call__(self, prediction: Prediction, t: Array) -> Array: ...  # noqa: D102


def simple() -> Weighting:
    """1 on the network's own output (Ho et al. 2020, eq. 14)."""
    return lambda prediction, t: jnp.ones_like(t)


def on_x0(weight: Callable[[Array, Array], Array]) -> Weighting:
    """The weighting that gives x0's squared error the weight `weight(alpha, sigma)`."""

    def on_y(prediction: Prediction, t: Array) -> Array:
        alpha, sigma = prediction.schedule.alpha(t), prediction.schedule.sigma(t)
        return weight(alpha, sigma) * (sigma / prediction.determinant(t)) ** 2

    return on_y


def snr() -> Weighting:
    """alpha^2 / sigma^2: the plain squared error of eps."""
    return on_x0(lambda alpha, sigma: (alpha / sigma) ** 2)


def truncated_snr() -> Weighting:
    """max(SNR, 1) (Salimans & Ho 2022, section 4)."""
    return on_x0(lambda alpha, sigma: jnp.maximum((alpha / sigma) ** 2, 1.0))


def min_snr(gamma: float = 5.0) -> Weighting:
    """min(SNR, gamma) (Hang et al. 2023, section 3.4)."""
    if not gamma > 0.0:
        raise ValueError(f"gamma must be positive, not {gamma}")
    return on_x0(lambda alpha, sigma: jnp.minimum((alpha / sigma) ** 2, gamma))


def edm(sigma_data: float = 0.5) -> Weighting:
    """(s^2 + sigma_data^2) / (s sigma_data)^2 with s = sigma / alpha (Karras et al. 2022, Table 1)."""
    if not sigma_data > 0.0:
        raise ValueError(f"sigma_data must be positive, not {sigma_data}")
    return on_x0(lambda alpha, sigma: (alpha / sigma) ** 2 + sigma_data**-2)


def sigmoid(bias: float = 0.0) -> Weighting:
    """The sigmoid of bias - logsnr on eps's squared error (Kingma & Gao 2023, section 4.2; Hoogeboom et al. 2024)."""

    def weight(alpha: Array, sigma: Array) -> Array:
        ratio = (alpha / sigma) ** 2
        return ratio * jax.nn.sigmoid(bias - jnp.log(ratio))

    return on_x0(weight)


WEIGHTINGS = {
    "simple": simple,
    "snr": snr,
    "truncated_snr": truncated_snr,
    "min_snr": min_snr,
    "edm": edm,
    "sigmoid": sigmoid,
}
