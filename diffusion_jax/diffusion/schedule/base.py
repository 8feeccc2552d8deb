"""What a schedule is, and what follows from its two curves."""

import math
from typing import Protocol

import jax
import jax.numpy as jnp

from diffusion_jax.types import Array


class Schedule(Protocol):
    """The interface. All methods are elementwise and keep the dtype: t in [0, 1], of any shape."""

    def alpha(self, t: Array) -> Array:
        """Scale of the data in x_t; 1 at t = 0."""
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
    """log(alpha^2 / sigma^2): +inf at t = 0, decreasing; -inf where alpha is 0."""
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
