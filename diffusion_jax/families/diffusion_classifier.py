"""A classifier of noisy images, trained beside the denoiser, whose gradient can guide it."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax

from diffusion_jax import networks, rng
from diffusion_jax.diffusion import guidance
from diffusion_jax.diffusion.broadcast import over
from diffusion_jax.diffusion.prediction import Prediction
from diffusion_jax.diffusion.time_sampling import TimeSampling
from diffusion_jax.types import Array, Denoiser, Tree


@dataclass(frozen=True, kw_only=True)
class NoisyClassifier:
    """p(label | x_t, t) by any backbone: its map of num_classes channels, averaged over the image.

    Attributes:
      network: with num_classes channels out; it is always told "no label".
      num_classes: of the data.
    """

    network: networks.Network
    num_classes: int

    def log_probability(
        self, params: Tree, prediction: Prediction, x: Array, t: Array, label: Array, dropout: Array | None = None
    ) -> Array:
        """log p(label | x) f32[n], for x f32[n,H,W,C] at t f32[] or f32[n] and label i32[n]."""
        time = jnp.atleast_1d(prediction.schedule.label(t))
        nothing = jnp.full(len(x), self.num_classes, jnp.int32)
        seen = self.network.apply(params, over(prediction.input_scale(t), x) * x, time, nothing, dropout)
        return -optax.softmax_cross_entropy_with_integer_labels(jnp.mean(seen, axis=(1, 2)), label)

    def loss(
        self, params: Tree, prediction: Prediction, times: TimeSampling, image: Array, label: Array, keys: Array
    ) -> Array:
        """Cross-entropy f32[B] on noisy images (Dhariwal & Nichol 2021, section 4), with keys key[B]."""
        schedule = prediction.schedule
        t = times(schedule, rng.uniform(rng.fold(keys, 0)))
        eps = rng.normal(rng.fold(keys, 1), image.shape[1:])
        x = over(schedule.alpha(t), image) * image + over(schedule.sigma(t), image) * eps
        return -self.log_probability(params, prediction, x, t, label, dropout=rng.fold(keys, 2))

    def guide(self, params: Tree, prediction: Prediction, label: Array, weight: Array, denoise: Denoiser) -> Denoiser:
        """`denoise`, pushed along the gradient; the classifier is not asked where the weight f32[] is 0."""
        log_probability = lambda x, t: self.log_probability(params, prediction, x, t, label)
        pushed = guidance.by_classifier(denoise, prediction.schedule, log_probability, weight)
        return lambda x, t: jax.lax.cond(weight == 0.0, lambda: denoise(x, t), lambda: pushed(x, t))
