"""Euler-Maruyama on the reverse-time SDE (Song et al. 2021, eq. 6), for any schedule."""

from dataclasses import dataclass

import jax.numpy as jnp

from diffusion_jax.diffusion.broadcast import over
from diffusion_jax.diffusion.schedule import Schedule
from diffusion_jax.diffusion.solvers.base import pytree
from diffusion_jax.diffusion.solvers.kernel import forward_kernel, with_noise
from diffusion_jax.types import Array, Denoiser


@pytree
@dataclass(frozen=True, kw_only=True)
class EulerMaruyama:
    """x_s = (2 - a) x_t + g^2 score + g z, with g^2 = sigma_t^2 (1 - r) and score = -eps / sigma_t.

    The SDE is dx = (f x - g(t)^2 score) dt + g(t) dw. Where alpha goes to 0 its f = alpha' / alpha and its g are
    infinite. So the step takes both from the forward kernel, x_t = a x_s + g z (their appendix E): it is the predictor
    of their algorithms 2 (a = 1) and 3 (a = sqrt(1 - beta)), differs from f (s - t) and g(t) sqrt(t - s) in terms of
    higher order only, and is finite at alpha_t = 0. The step to s = 0 is alpha_s x0, the denoising step with which they
    end: the SDE's own step would not reach a single point.
    """

    def init(self, x: Array) -> tuple:  # noqa: D102
        return ()

    def step(  # noqa: D102
        self, denoise: Denoiser, schedule: Schedule, x: Array, t: Array, s: Array, carry: tuple, keys: Array
    ) -> tuple[Array, tuple]:
        d = denoise(x, t)
        a, r = forward_kernel(schedule, s, t)
        g = jnp.where(s > 0.0, schedule.sigma(t) * jnp.sqrt(1.0 - r), 0.0)
        score_step = over(schedule.sigma(t) * (1.0 - r), x) * d.eps  # -g^2 score
        moved = jnp.where(s > 0.0, over(2.0 - a, x) * x - score_step, over(schedule.alpha(s), x) * d.x0)
        return with_noise(moved, g, keys), carry
