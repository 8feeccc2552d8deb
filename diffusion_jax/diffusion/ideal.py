"""Data whose ideal denoiser is known in closed form: what a perfect network would say, to judge solvers by.

For x0 a mixture of Gaussians with weights p_k, means m_k and standard deviations s_k, and x = alpha x0 + sigma eps,

    V_k = alpha^2 s_k^2 + sigma^2,        r_k ~ p_k N(x; alpha m_k, V_k),
    E[x0 | x]  = sum_k r_k (m_k + alpha s_k^2 / V_k (x - alpha m_k)),
    E[eps | x] = sum_k r_k sigma / V_k (x - alpha m_k)

(Bayes; the second is -sigma times the score). A finite data set is the mixture of its points, with s_k = 0.
"""

import jax
import jax.numpy as jnp

from diffusion_jax.diffusion.broadcast import over
from diffusion_jax.diffusion.schedule import Schedule
from diffusion_jax.types import Array, Denoised, Denoiser


def mixture(schedule: Schedule, means: Array, stds: Array, weights: Array) -> Denoiser:
    """The ideal denoiser of images drawn from a mixture of isotropic Gaussians.

    Args:
      schedule: alpha and sigma.
      means: f[K,H,W,C], centres of the components.
      stds: f[K], 0 or more.
      weights: f[K], positive, of sum 1.
    """

    def denoise(x: Array, t: Array) -> Denoised:
        alpha, sigma = (jnp.broadcast_to(c, x.shape[:1]) for c in (schedule.alpha(t), schedule.sigma(t)))
        variance = alpha[:, None] ** 2 * stds[None] ** 2 + sigma[:, None] ** 2  # [n, K]
        off = x[:, None] - over(alpha, x)[:, None] * means[None]  # [n, K, H, W, C]
        distance = jnp.sum(off**2, axis=(2, 3, 4))
        dimensions = x[0].size
        log_r = jnp.log(weights)[None] - 0.5 * dimensions * jnp.log(variance) - 0.5 * distance / variance
        off = off * over(jax.nn.softmax(log_r, axis=1) / variance, off)
        gain = over(alpha[:, None] * stds[None] ** 2, off)
        x0 = jnp.sum(over(jax.nn.softmax(log_r, axis=1), off) * means[None] + gain * off, axis=1)
        return Denoised(x0, over(sigma, x) * jnp.sum(off, axis=1))

    return denoise


def gaussian_flow(schedule: Schedule, x: Array, t: Array, s: Array, mean: float, std: float) -> Array:
    """Where the probability-flow ODE of N(mean, std^2) takes x from t to s: by the ratio of standard deviations."""
    total = lambda t: jnp.hypot(schedule.alpha(t) * std, schedule.sigma(t))
    return schedule.alpha(s) * mean + (x - schedule.alpha(t) * mean) * total(s) / total(t)
