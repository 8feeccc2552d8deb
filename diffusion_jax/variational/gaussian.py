"""Diagonal Gaussians: a draw that gradients pass through, densities, and divergences in closed form."""

import math
from typing import NamedTuple

import jax.numpy as jnp

from diffusion_jax.types import Array


class Gaussian(NamedTuple):
    """N(mean, exp(log_std)^2) in each number, all independent.

    Attributes:
      mean: f[...].
      log_std: f[...], of the same shape.
    """

    mean: Array | float
    log_std: Array | float


STANDARD = Gaussian(0.0, 0.0)
"""N(0, 1)."""


def reparameterised(q: Gaussian, eps: Array) -> Array:
    """z = mean + std eps f[...]: with eps ~ N(0, 1) a draw from q, differentiable in q (Kingma & Welling 2014, 2.4)."""
    return q.mean + jnp.exp(q.log_std) * eps


def log_density(q: Gaussian, z: Array) -> Array:
    """log N(z; mean, std^2) f[...], of each number."""
    return -0.5 * (jnp.square((z - q.mean) * jnp.exp(-q.log_std)) + math.log(2.0 * math.pi)) - q.log_std


def kl(q: Gaussian, p: Gaussian = STANDARD) -> Array:
    """KL(q || p) f[...] in nats, of each number.

        log (s_p / s_q) + (s_q^2 + (m_q - m_p)^2) / (2 s_p^2) - 1/2

    To N(0, 1) this is (m^2 + s^2 - 1 - log s^2) / 2 (Kingma & Welling 2014, appendix B).
    """
    log_ratio = q.log_std - p.log_std
    distance = (q.mean - p.mean) * jnp.exp(-p.log_std)
    return 0.5 * (jnp.exp(2.0 * log_ratio) + jnp.square(distance) - 1.0) - log_ratio
