"""The forward process between two times, which every stochastic step undoes.

For s below t (Kingma et al. 2021, appendix A), with a = alpha_t / alpha_s and r = SNR_t / SNR_s,

    q(x_t | x_s)     = N(a x_s, sigma_t^2 (1 - r)),
    q(x_s | x_t, x0) = N(alpha_s x0 + sqrt(r) sigma_s eps, sigma_s^2 (1 - r)),    eps = (x_t - alpha_t x0) / sigma_t.

Nothing here divides by alpha_t or by sigma_s, which are 0 at the two ends.
"""

import jax
import jax.numpy as jnp

from diffusion_jax import rng
from diffusion_jax.diffusion.broadcast import over
from diffusion_jax.diffusion.schedule import Schedule
from diffusion_jax.types import Array


def forward_kernel(schedule: Schedule, s: Array, t: Array) -> tuple[Array, Array]:
    """(a, r) of the kernel from s up to t, each f32[], r in [0, 1]; (1, 1) where s is not below t."""
    a = schedule.alpha(t) / schedule.alpha(s)
    r = jnp.minimum((a * schedule.sigma(s) / schedule.sigma(t)) ** 2, 1.0)
    return jnp.where(s < t, a, 1.0), jnp.where(s < t, r, 1.0)


def with_noise(x: Array, scale: Array, keys: Array) -> Array:
    """x + scale z for x f32[n,H,W,C] and z ~ N(0, I), an image's own by its key of keys key[n].

    scale is f32[], f32[n] or as large as x; where all of it is 0, as in a last step, nothing is drawn.
    """
    add = lambda x: x + over(scale, x) * rng.normal(keys, x.shape[1:], x.dtype)
    return jax.lax.cond(jnp.any(scale > 0.0), add, lambda x: x, x)
