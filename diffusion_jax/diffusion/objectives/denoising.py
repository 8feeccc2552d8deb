"""The denoising objective: E w(t) |y - network(x_t)|^2 with x_t = alpha x0 + sigma eps (Ho et al. 2020, eq. 14)."""

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp

from diffusion_jax import rng
from diffusion_jax.diffusion.broadcast import over
from diffusion_jax.diffusion.prediction import Prediction
from diffusion_jax.diffusion.time_sampling import TimeSampling
from diffusion_jax.diffusion.weighting import Weighting
from diffusion_jax.types import Array


@dataclass(frozen=True, kw_only=True)
class Denoising:
    """A prediction, how to draw its times and how to weigh them."""

    prediction: Prediction
    time_sampling: TimeSampling
    weighting: Weighting

    def loss(self, predict: Callable[[Array, Array], Array], x0: Array, u: Array, keys: Array) -> tuple[Array, Array]:
        """Losses f32[B] and times f32[B].

        Args:
          predict: (x f32[B,H,W,C], t f32[B]) -> y, the network's output.
          x0: f32[B,H,W,C] in [-1,1].
          u: f32[B] in [0, 1), quantiles of the times.
          keys: key[B], for the noise, one an example.
        """
        schedule = self.prediction.schedule
        t = self.time_sampling(schedule, u)
        eps = rng.normal(keys, x0.shape[1:])
        x = over(schedule.alpha(t), x0) * x0 + over(schedule.sigma(t), x0) * eps
        error = self.prediction.target(x0, eps, t) - predict(x, t).astype(jnp.float32)
        return self.weighting(self.prediction, t) * jnp.mean(jnp.square(error), axis=(1, 2, 3)), t
