"""Guidance by a classifier's gradient, which needs no second model of images."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffusion_jax.diffusion.broadcast import over
from diffusion_jax.diffusion.schedule import Schedule
from diffusion_jax.types import Array, Denoised, Denoiser


def by_classifier(
    denoise: Denoiser, schedule: Schedule, log_probability: Callable[[Array, Array], Array], weight: Array
) -> Denoiser:
    """Push x towards what a classifier of noisy images takes for the label (Dhariwal & Nichol 2021, eq. 14).

    With g = grad_x log p(y | x, t):  eps' = eps - weight sigma g,  and so  x0' = x0 + weight sigma^2 / alpha g.

    Where alpha is 0, x holds nothing of the image, so that g is 0 and the second term 0 / 0: both are left out, and the
    first step from there is the unguided model's.

    Args:
      denoise: the model, without a label.
      schedule: its schedule.
      log_probability: (x, t) -> f32[n], log p(y | x_t = x) of the label that each image is to show, up to a constant.
      weight: f32[]; at 1 the result is Bayes' posterior, if model and classifier are exact.
    """

    def guided(x: Array, t: Array) -> Denoised:
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        d = denoise(x, t)
        gradient = jax.grad(lambda x: jnp.sum(log_probability(x, t)))(x)
        push = over(weight, x) * over(jnp.where(alpha > 0.0, sigma, 0.0), x) * gradient
        ratio = sigma / jnp.where(alpha > 0.0, alpha, 1.0)
        return d._replace(x0=d.x0 + over(ratio, x) * push, eps=d.eps - push)

    return guided
