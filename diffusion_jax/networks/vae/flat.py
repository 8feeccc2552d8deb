"""The flat autoencoder (Kingma & Welling 2014, appendix C): one vector of latents, here with convolutions around it."""

from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp

from diffusion_jax.networks import layers
from diffusion_jax.networks.layers import Dense
from diffusion_jax.networks.vae.blocks import Block, Encoder, Inferred, Out, Start, Up, bounded, check_sizes, widths
from diffusion_jax.types import Array


@dataclass(frozen=True, kw_only=True)
class FlatOptions:
    """Sizes of a flat autoencoder.

    Attributes:
      latents: D, length of the latent vector.
      channels: at the image's own resolution.
      multipliers: of `channels` at each resolution; every further one halves the image's side.
      blocks: residual blocks a resolution, on either way.
    """

    latents: int = 32
    channels: int = 32
    multipliers: tuple = (1, 2)
    blocks: int = 1

    def __post_init__(self) -> None:
        check_sizes(self)
        if self.latents < 1:
            raise ValueError(f"latents must be at least 1, not {self.latents}")


class Flat(nn.Module):
    """Encoder, z = mean + std eps, decoder."""

    options: FlatOptions
    size: int
    channels_out: int
    num_classes: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array | None, label: Array | None, eps: Array) -> Inferred:
        """See `networks.vae.Autoencoder`: `infer`, or `decode` where x is None."""
        mean = log_std = None
        z = eps
        if x is not None:
            top = Encoder(self.options, self.num_classes, self.dtype, name="encoder")(x, label)[-1]
            top = nn.silu(top).astype(jnp.float32).reshape(len(eps), -1)
            posterior = Dense(2 * self.options.latents, kernel_init=layers.ZEROS, name="posterior")(top)
            mean, log_std = jnp.split(posterior, 2, axis=-1)
            log_std = bounded(log_std)
            z = mean + jnp.exp(log_std) * eps
        return Inferred(mean, log_std, self.decode(z, label))

    def decode(self, z: Array, label: Array | None) -> Array:
        """f32[B,D] -> f32[B,H,W,P]."""
        features = widths(self.options)
        side = self.size >> (len(features) - 1)
        x = Start(side, features[-1], self.num_classes, self.dtype, name="start")(len(z), label)
        x = x + Dense(side * side * features[-1], self.dtype, name="latents")(z).reshape(x.shape)
        for i, width in reversed(list(enumerate(features))):
            if i < len(features) - 1:
                x = Up(width, self.dtype, name=f"up_{i}")(x)
            for j in range(self.options.blocks):
                x = Block(self.dtype, name=f"block_{i}_{j}")(x)
        return Out(self.channels_out, name="out")(x)


def level_sizes(options: FlatOptions, size: int) -> tuple[int, ...]:
    """One level."""
    return (options.latents,)
