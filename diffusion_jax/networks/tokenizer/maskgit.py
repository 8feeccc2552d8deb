"""The autoencoder of MaskGIT (Chang et al. 2022): VQGAN's without attention, as google-research/maskgit has it.

    encoder  conv -> [blocks, average 2x2 pixels] ... blocks -> blocks -> norm, silu, 1x1 conv
    decoder  conv -> blocks -> [blocks, double, conv] ... blocks -> norm, silu, conv
    block    x + y,        y = conv(silu(norm(conv(silu(norm(x))))))
             y + conv(y)   with a 1x1 convolution, where the width changes

No convolution in a block has a bias. That a block which changes the width has no way around it is as published.
"""

from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp

from diffusion_jax.networks.adm import halved
from diffusion_jax.networks.layers import Conv, GroupNorm
from diffusion_jax.networks.unet import doubled
from diffusion_jax.networks.vae.blocks import Out, check_sizes, widths
from diffusion_jax.types import Array


@dataclass(frozen=True, kw_only=True)
class MaskGITOptions:
    """Sizes of the autoencoder. The defaults are the published ones.

    Attributes:
      channels: at the image's resolution.
      multipliers: of `channels` at each resolution; every further one halves the image's side.
      blocks: residual blocks a resolution, and once more in the middle of each network.
    """

    channels: int = 128
    multipliers: tuple = (1, 1, 2, 2, 4)
    blocks: int = 2

    def __post_init__(self) -> None:
        check_sizes(self)


class Encoder(nn.Module):
    """An image to the numbers that a bottleneck asks for."""

    options: MaskGITOptions
    outputs: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B,H,W,C] -> f32[B,h,w,outputs]."""
        x = Conv(self.options.channels, dtype=self.dtype, bias=False, name="in")(x)
        for level, width in enumerate(widths(self.options)):
            x = Stage(self.options.blocks, width, self.dtype, name=f"stage_{level}")(halved(x) if level else x)
        x = Stage(self.options.blocks, x.shape[-1], self.dtype, name="middle")(x)
        x = nn.silu(GroupNorm(name="norm")(x.astype(jnp.float32)))
        return Conv(self.outputs, size=1, name="out")(x)


class Decoder(nn.Module):
    """Latents to an image."""

    options: MaskGITOptions
    channels_out: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, z: Array) -> Array:
        """[B,h,w,latents] -> f32[B,H,W,channels_out]."""
        x = Conv(widths(self.options)[-1], dtype=self.dtype, name="in")(z)
        x = Stage(self.options.blocks, x.shape[-1], self.dtype, name="middle")(x)
        for level, width in reversed(list(enumerate(widths(self.options)))):
            x = Stage(self.options.blocks, width, self.dtype, name=f"stage_{level}")(x)
            if level:
                x = Conv(width, dtype=self.dtype, name=f"up_{level}")(doubled(x))
        return Out(self.channels_out, name="out")(x)


class Stage(nn.Module):
    """The blocks of one resolution."""

    blocks: int
    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B,H,W,C] -> [B,H,W,features]."""
        for i in range(self.blocks):
            x = Block(self.features, self.dtype, name=f"block_{i}")(x)
        return x


class Block(nn.Module):
    """x + y, or y + conv(y) where the width changes: see above."""

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B,H,W,C] -> [B,H,W,features]."""
        conv = lambda name, size=3: Conv(self.features, size, dtype=self.dtype, bias=False, name=name)
        y = conv("conv_0")(nn.silu(GroupNorm(name="norm_0")(x)))
        y = conv("conv_1")(nn.silu(GroupNorm(name="norm_1")(y)))
        return y + (x if x.shape[-1] == self.features else conv("skip", 1)(y))
