"""The autoencoder of VQGAN (Esser et al. 2021, Table 7), which latent diffusion kept (Rombach et al. 2022, appendix G).

    encoder  conv -> [blocks, halve] ... blocks -> block, attention, block -> norm, silu, conv -> 1x1 conv
    decoder  1x1 conv -> conv -> block, attention, block -> [blocks, double] ... blocks -> norm, silu, conv
    block    skip(x) + conv(silu(norm(conv(silu(norm(x))))))

The decoder has one block more at each resolution; skip is a 1x1 convolution where the width changes. Kernels begin as
torch's do, but for those behind attention, which begin at 0. Between the two 1x1 convolutions stands the bottleneck.
"""

from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp

from diffusion_jax.networks import layers
from diffusion_jax.networks.layers import Conv, GroupNorm
from diffusion_jax.networks.unet import Attention, doubled
from diffusion_jax.networks.vae.blocks import Out, check_sizes, widths
from diffusion_jax.types import Array


@dataclass(frozen=True, kw_only=True)
class VQGANOptions:
    """Sizes of the autoencoder. The defaults are those of latent diffusion's KL-f8.

    Attributes:
      channels: at the image's resolution.
      multipliers: of `channels` at each resolution; every further one halves the image's side.
      blocks: residual blocks a resolution in the encoder; one more in the decoder.
      attention: sides, in pixels, at which the blocks are followed by attention; between encoder and decoder there is
        one at any side.
      features: channels before the encoder's 1x1 convolution and after the decoder's; 0 for as many as there are on the
        other side of it.
      projection: whether there are the two 1x1 convolutions.
    """

    channels: int = 128
    multipliers: tuple = (1, 2, 4, 4)
    blocks: int = 2
    attention: tuple = ()
    features: int = 0
    projection: bool = True

    def __post_init__(self) -> None:
        check_sizes(self)
        if any(not isinstance(side, int) or side < 1 for side in self.attention):
            raise ValueError(f"attention must be whole numbers of pixels, not {self.attention}")
        if self.features < 0:
            raise ValueError(f"features must be at least 0, not {self.features}")
        if self.features and not self.projection:
            raise ValueError("features are those of the projection; without it leave them out")


class Encoder(nn.Module):
    """An image to the numbers that a bottleneck asks for."""

    options: VQGANOptions
    outputs: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B,H,W,C] -> f32[B,h,w,outputs]."""
        o = self.options
        x = Conv(o.channels, dtype=self.dtype, kernel_init=layers.UNIFORM, name="in")(x)
        for level, width in enumerate(widths(o)):
            if level:
                x = Conv(x.shape[-1], stride=2, dtype=self.dtype, kernel_init=layers.UNIFORM, name=f"down_{level}")(x)
            x = Stage(o.blocks, width, x.shape[1] in o.attention, self.dtype, name=f"stage_{level}")(x)
        x = Middle(self.dtype, name="middle")(x)
        x = Out(o.features or self.outputs, layers.UNIFORM, name="out")(x)
        return _projected(x, self.outputs) if o.projection else x


class Decoder(nn.Module):
    """Latents to an image."""

    options: VQGANOptions
    channels_out: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, z: Array) -> Array:
        """[B,h,w,latents] -> f32[B,H,W,channels_out]."""
        o = self.options
        x = _projected(z, o.features or z.shape[-1]) if o.projection else z
        x = Conv(widths(o)[-1], dtype=self.dtype, kernel_init=layers.UNIFORM, name="in")(x)
        x = Middle(self.dtype, name="middle")(x)
        for level, width in reversed(list(enumerate(widths(o)))):
            x = Stage(o.blocks + 1, width, x.shape[1] in o.attention, self.dtype, name=f"stage_{level}")(x)
            if level:
                x = Conv(width, dtype=self.dtype, kernel_init=layers.UNIFORM, name=f"up_{level}")(doubled(x))
        return Out(self.channels_out, layers.UNIFORM, name="out")(x)


def _projected(x: Array, features: int) -> Array:
    """The 1x1 convolution beside the bottleneck, in float32: it holds few numbers, and all of them count."""
    return Conv(features, size=1, kernel_init=layers.UNIFORM, name="projection")(x)


class Stage(nn.Module):
    """The blocks of one resolution, each followed by attention where `attention` is set."""

    blocks: int
    features: int
    attention: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B,H,W,C] -> [B,H,W,features]."""
        for i in range(self.blocks):
            x = Block(self.features, self.dtype, name=f"block_{i}")(x)
            if self.attention:
                x = Attention("auto", self.dtype, name=f"attention_{i}")(x)
        return x


class Middle(nn.Module):
    """A block, attention, a block."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B,H,W,C] -> the same."""
        x = Block(x.shape[-1], self.dtype, name="block_0")(x)
        x = Attention("auto", self.dtype, name="attention")(x)
        return Block(x.shape[-1], self.dtype, name="block_1")(x)


class Block(nn.Module):
    """skip(x) + conv(silu(norm(conv(silu(norm(x))))))."""

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B,H,W,C] -> [B,H,W,features]."""
        conv = lambda name, size=3: Conv(self.features, size, 1, None, self.dtype, layers.UNIFORM, name=name)
        y = conv("conv_0")(nn.silu(GroupNorm(name="norm_0")(x)))
        y = conv("conv_1")(nn.silu(GroupNorm(name="norm_1")(y)))
        return (x if x.shape[-1] == self.features else conv("skip", 1)(x)) + y
