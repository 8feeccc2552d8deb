"""The bottleneck of latent diffusion (Rombach et al. 2022, section 3.1): a Gaussian, near N(0, 1) by a small weight.

    q(z | x) = N(m, s^2),  m and log s^2 from the encoder          loss = weight KL(q || N(0, 1)) / dimensions

The reconstruction's error is a mean over the image's numbers, so the KL is divided by how many these are: `weight` is
the one that the paper's codebase puts before a KL beside an error that is summed (10^-6).
"""

from dataclasses import dataclass

import jax.numpy as jnp

from diffusion_jax import rng
from diffusion_jax.tokenizers.bottlenecks.base import Passed
from diffusion_jax.types import Array, Tree
from diffusion_jax.variational import gaussian
from diffusion_jax.variational.gaussian import Gaussian

LOG_VARIANCES = (-30.0, 20.0)
"""log s^2 is kept between these, as in CompVis/latent-diffusion."""


@dataclass(frozen=True, kw_only=True)
class KL:
    """See above; a row of `BOTTLENECKS`.

    Attributes:
      dimensions: numbers in an image.
      latents: numbers a place in z.
      weight: of the KL beside an error that is summed over the image.
    """

    dimensions: int
    latents: int = 4
    weight: float = 1e-6

    def __post_init__(self) -> None:
        if self.latents < 1:
            raise ValueError(f"latents must be at least 1, not {self.latents}")
        if not self.weight >= 0.0:
            raise ValueError(f"weight must not be negative, and {self.weight} is")

    @property
    def outputs(self) -> int:
        """See `Bottleneck`: mean and log variance."""
        return 2 * self.latents

    @property
    def digits(self) -> tuple[int, ...]:
        """See `Bottleneck`."""
        return ()

    def init(self, key: Array) -> tuple[Tree, Tree]:
        """See `Bottleneck`: there is nothing to learn."""
        return {}, {}

    def posterior(self, y: Array) -> Gaussian:
        """q(z | x) f32[B,h,w,latents] from the encoder's y f32[B,h,w,outputs]."""
        mean, log_variance = jnp.split(y, 2, axis=-1)
        return Gaussian(mean, 0.5 * jnp.clip(log_variance, *LOG_VARIANCES))

    def train(self, params: Tree, extra: Tree, y: Array, keys: Array, step: Array) -> Passed:
        """See `Bottleneck`."""
        nats = jnp.sum(gaussian.kl(self.posterior(y)), axis=(1, 2, 3))
        loss = self.weight * nats / self.dimensions
        return Passed(z=self.encode(params, y, keys), loss=loss, metrics={"kl": jnp.mean(nats)}, extra=extra)

    def encode(self, params: Tree, y: Array, keys: Array | None) -> Array:
        """See `Bottleneck`: a draw by keys, the mean without."""
        q = self.posterior(y)
        return q.mean if keys is None else gaussian.reparameterised(q, rng.normal(keys, q.mean.shape[1:]))

    def decode(self, params: Tree, given: Array) -> Array:
        """See `Bottleneck`: latents are what the decoder is given."""
        return given

    def nearest(self, params: Tree, z: Array) -> Array:
        """See `Bottleneck`: all are latents."""
        return z

    def settle(self, params: Tree, extra: Tree) -> Tree:
        """See `Bottleneck`."""
        return params
