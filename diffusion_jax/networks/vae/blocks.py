"""What the two autoencoders share: blocks, the way up from an image, and the way down to its pixels."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from diffusion_jax.networks import layers, unet
from diffusion_jax.networks.layers import Conv, GroupNorm
from diffusion_jax.types import Array


class Inferred(NamedTuple):
    """The posterior of an image's latents, in units of the prior, and what the decoder makes of one draw from it.

    Without an image there is no posterior: `mean` and `log_std` are None, and the draw is from the prior.

    Attributes:
      mean: f32[B,D].
      log_std: f32[B,D], in `LOG_STDS`.
      pixels: f32[B,H,W,P].
    """

    mean: Array | None
    log_std: Array | None
    pixels: Array


LOG_STDS = (-15.0, 10.0)
"""Each log std, of a prior or a posterior, is kept between these: CompVis/latent-diffusion keeps its log variances in
[-30, 20] (Rombach et al. 2022). No training is meant to come near; beyond, squares of exp leave float32."""


def bounded(log_std: Array) -> Array:
    """log_std f32[...] in `LOG_STDS`."""
    return jnp.clip(log_std, *LOG_STDS)


def check_sizes(options: Any) -> None:
    """Raise a ValueError for what no autoencoder can have, in the options that all of them share."""
    unet.check_multipliers(options.multipliers)
    if options.blocks < 1:
        raise ValueError(f"blocks must be at least 1, not {options.blocks}")
    for features in widths(options):
        if features < 4 or features % min(32, features // 4):
            raise ValueError(f"channels times a multiplier = {features}: the norms' groups of 4 or more must divide it")


def widths(options: Any) -> list[int]:
    """Channels at each resolution, the finest first."""
    return [options.channels * multiplier for multiplier in options.multipliers]


def size_error(options: Any, size: int) -> str:
    """Why images of `size` pixels cannot be halved as often as `options.multipliers` say, or ""."""
    halvings = len(options.multipliers) - 1
    if size % 2**halvings == 0:
        return ""
    return f"{len(options.multipliers)} multipliers halve the image {halvings} times, and {size} pixels cannot be"


class Block(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), the last convolution starting at zero."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B,H,W,C] -> the same."""
        C = x.shape[-1]
        y = Conv(C, dtype=self.dtype, name="conv_0")(nn.silu(GroupNorm(name="norm_0")(x)))
        y = nn.silu(GroupNorm(name="norm_1")(y))
        return x + Conv(C, dtype=self.dtype, kernel_init=layers.ZEROS, name="conv_1")(y)


class Encoder(nn.Module):
    """The way up: blocks at each resolution, the next of half the side. The label is added where it begins."""

    options: Any
    num_classes: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, label: Array | None) -> list[Array]:
        """[B,H,W,C], i32[B] -> what there is at each resolution, the finest first."""
        features = widths(self.options)
        x = Conv(features[0], dtype=self.dtype, name="in")(x)
        if self.num_classes:
            table = self.param("label", nn.initializers.normal(0.02), (self.num_classes, features[0]))
            x = unet.add(x, table[label])
        stages = []
        for i, width in enumerate(features):
            if i:
                x = Conv(width, stride=2, dtype=self.dtype, name=f"down_{i}")(x)
            for j in range(self.options.blocks):
                x = Block(self.dtype, name=f"block_{i}_{j}")(x)
            stages.append(x)
        return stages


class Start(nn.Module):
    """Where the way down begins: one learned array, or one a class."""

    side: int
    features: int
    num_classes: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, count: int, label: Array | None) -> Array:
        """i32[count] or None -> [count,side,side,features]."""
        shape = (max(self.num_classes, 1), self.side, self.side, self.features)
        table = self.param("table", nn.initializers.normal(0.02), shape)
        x = table[label] if self.num_classes else jnp.broadcast_to(table, (count, *shape[1:]))
        return x.astype(self.dtype)


class Up(nn.Module):
    """Twice the side, then a convolution."""

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B,H,W,C] -> [B,2H,2W,features]."""
        return Conv(self.features, dtype=self.dtype, name="conv")(unet.doubled(x))


class Out(nn.Module):
    """A norm and a convolution in float32, whose kernel starts by `kernel_init`."""

    features: int
    kernel_init: nn.initializers.Initializer = layers.XAVIER

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B,H,W,C] -> f32[B,H,W,features]."""
        x = nn.silu(GroupNorm(name="norm")(x.astype(jnp.float32)))
        return Conv(self.features, kernel_init=self.kernel_init, name="conv")(x)
