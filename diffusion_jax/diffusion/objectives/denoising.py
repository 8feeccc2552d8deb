"""The denoising objective: E w(t) |y - network(x_t)|^2 with x_t = alpha x0 + sigma eps (Ho et al. 2020, eq. 14)."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from diffusion_jax import rng
from diffusion_jax.diffusion.broadcast import over
from diffusion_jax.diffusion.prediction import Prediction
from diffusion_jax.diffusion.time_sampling import TimeSampling
from diffusion_jax.diffusion.weighting import Weighting
from diffusion_jax.types import Array, Denoised


@dataclass(frozen=True, kw_only=True)
class Denoising:
    """A prediction, how to draw its times and how to weigh them."""

    prediction: Prediction
    time_sampling: TimeSampling
    weighting: Weighting

    def channels(self, image: int) -> int:  # noqa: D102
        return image

    def loss(  # noqa: D102
        self, predict: Callable[[Array, Array], Array], x0: Array, u: Array, keys: Array
    ) -> tuple[Array, Array]:
        schedule = self.prediction.schedule
        t, slope = jax.jvp(lambda u: self.time_sampling(schedule, u), (u,), (jnp.ones_like(u),))
        eps = rng.normal(keys, x0.shape[1:])
        x = over(schedule.alpha(t), x0) * x0 + over(schedule.sigma(t), x0) * eps
        error = self.prediction.target(x0, eps, t) - predict(x, t).astype(jnp.float32)
        return self.weighting(self.prediction, t, slope) * jnp.mean(jnp.square(error), axis=(1, 2, 3)), t

    def denoised(self, x: Array, y: Array, t: Array) -> Denoised:  # noqa: D102
        return Denoised(*self.prediction.split(x, y, t))
