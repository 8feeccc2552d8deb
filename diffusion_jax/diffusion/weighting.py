"""Loss weights on the squared error of the network's output y, and what they make of its mean over the times.

Two conventions live in the papers, and a row belongs to one of them:

- A weight that *multiplies* the density of the times. Stated on x0 as w(alpha, sigma), it is w sigma^2 / D^2 on y, of
  which x0's error is sigma / D times (`on_x0`). `simple` is the exception that the papers make: the plain squared error
  of y, whatever y is. What is learned best depends on the time sampling as much as on the weight.
- An *integral* over log-SNR, 1/2 int w(logsnr) E|eps - eps_hat|^2 dlogsnr (Kingma & Gao 2023, section 2): the time
  sampling changes its variance only, so its density p(t) is divided out (`over_logsnr`). A time sampling is the
  inverse distribution t(u); 1 / p(t) = dt/du.

All of them estimate the same model and differ in emphasis only (Kingma & Gao 2023, Table 1).
"""

from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp

from diffusion_jax.diffusion.prediction import Prediction
from diffusion_jax.diffusion.schedule import logsnr, with_derivatives
from diffusion_jax.types import Array


class Weighting(Protocol):
    """(prediction, t, dt/du) -> the weight on the squared error of y, all of t's shape.

    dt/du = 1 / p(t) is the slope of the time sampling at t.
    """

    def __call__(self, prediction: Prediction, t: Array, slope: Array) -> Array: ...  # noqa: D102


def simple() -> Weighting:
    """1 on the network's own output (Ho et al. 2020, eq. 14)."""
    return lambda prediction, t, slope: jnp.ones_like(t)


def on_x0(weight: Callable[[Array, Array], Array]) -> Weighting:
    """The weighting that gives x0's squared error the weight `weight(alpha, sigma)`."""

    def on_y(prediction: Prediction, t: Array, slope: Array) -> Array:
        alpha, sigma = prediction.schedule.alpha(t), prediction.schedule.sigma(t)
        return weight(alpha, sigma) * (sigma / prediction.determinant(t)) ** 2

    return on_y


def over_logsnr(weight: Callable[[Array], Array]) -> Weighting:
    """The weighting whose mean is 1/2 int weight(logsnr) |eps - eps_hat|^2 dlogsnr, under any time sampling.

    Over the log-SNRs that it reaches: the tails of `logit_normal` end 5.2 standard deviations from the mean, which on
    many schedules is far from the data. With `uniform` times nothing is left out.

    -dlogsnr/dt / 2 = (alpha sigma' - sigma alpha') / (alpha sigma), and eps's error is alpha / D times y's: one alpha
    cancels, and nothing is divided by an alpha of 0.
    """

    def on_y(prediction: Prediction, t: Array, slope: Array) -> Array:
        alpha, sigma, d_alpha, d_sigma = with_derivatives(prediction.schedule, t)
        on_eps = weight(logsnr(prediction.schedule, t)) * (alpha * d_sigma - sigma * d_alpha)
        return on_eps * alpha / sigma / prediction.determinant(t) ** 2 * slope

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


def elbo() -> Weighting:
    """1: the diffusion term of the variational bound in nats a dimension (Kingma et al. 2021, eq. 17-18)."""
    return over_logsnr(jnp.ones_like)


def sigmoid(bias: float = 0.0) -> Weighting:
    """The sigmoid of bias - logsnr (Kingma & Gao 2023, section 4.2; Hoogeboom et al. 2024, SiD2).

    The bound with less of the fine detail: noise levels of a log-SNR far above `bias` hardly count.
    """
    return over_logsnr(lambda logsnr: jax.nn.sigmoid(bias - logsnr))


WEIGHTINGS = {
    "simple": simple,
    "snr": snr,
    "truncated_snr": truncated_snr,
    "min_snr": min_snr,
    "edm": edm,
    "elbo": elbo,
    "sigmoid": sigmoid,
}
