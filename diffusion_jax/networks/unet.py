"""The DDPM U-Net (Ho et al. 2020, appendix B): residual blocks, attention at chosen resolutions, skips.

As in hojonathanho/diffusion, where labels are ours: an embedding added to the time's.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from diffusion_jax.networks import attention, layers, remat
from diffusion_jax.networks.layers import Conv, Dense, GroupNorm
from diffusion_jax.types import Array


@dataclass(frozen=True, kw_only=True)
class UNetOptions:
    """Sizes of a U-Net. The defaults are DDPM's for CIFAR-10: 35,746,307 parameters without labels.

    Attributes:
      channels: at the first resolution; a multiple of 32, the number of groups of the norms.
      multipliers: of `channels` at each resolution; every further one halves the image's side.
      blocks: residual blocks a resolution on the way down; one more on the way up.
      attention: sides, in pixels, at which the residual blocks are followed by attention.
      dropout: probability inside the residual blocks.
      remat: from `remat.POLICIES`, what the backward pass keeps of each block.
      attention_implementation: from `attention.IMPLEMENTATIONS`, or "auto".
    """

    channels: int = 128
    multipliers: tuple = (1, 2, 2, 2)
    blocks: int = 2
    attention: tuple = (16,)
    dropout: float = 0.1
    remat: str = "none"
    attention_implementation: str = "auto"

    def __post_init__(self) -> None:
        check_sizes(self)
        check_multipliers(self.multipliers)


def check_sizes(options: Any) -> None:
    """Raise a ValueError for what no U-Net can have, in the options that `unet` and `adm` share."""
    if options.channels < 32 or options.channels % 32:
        raise ValueError(f"channels must be a multiple of 32, not {options.channels}")
    if any(not isinstance(side, int) or side < 1 for side in options.attention):
        raise ValueError(f"attention must be whole numbers of pixels, not {options.attention}")
    if options.blocks < 1:
        raise ValueError(f"blocks must be at least 1, not {options.blocks}")
    if not 0.0 <= options.dropout < 1.0:
        raise ValueError(f"dropout must lie in [0, 1), not {options.dropout}")
    remat.check(options.remat)
    attention.check(options.attention_implementation)


def check_multipliers(multipliers: tuple) -> None:
    """Raise a ValueError unless all are whole numbers."""
    if not multipliers or any(not isinstance(m, int) or m < 1 for m in multipliers):
        raise ValueError(f"multipliers must be whole numbers of at least 1, not {multipliers}")


class UNet(nn.Module):
    """Down, middle, up."""

    options: UNetOptions
    channels_out: int
    num_classes: int  # 0: no label; the label `num_classes` itself stands for "none"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, time: Array, label: Array | None, keys: Array | None) -> Array:
        """See `networks.Network.apply`."""
        o = self.options
        condition = self.condition(time, label)
        layer = itertools.count()
        residual_block, attention_block = remat.block(ResidualBlock, o.remat), remat.block(Attention, o.remat)

        def residual(x: Array, features: int, name: str) -> Array:
            return residual_block(features, o.dropout, next(layer), self.dtype, name=name)(x, condition, keys)

        def attend(x: Array, name: str) -> Array:
            return attention_block(o.attention_implementation, self.dtype, name=f"{name}_attention")(x)

        def block(x: Array, features: int, name: str) -> Array:
            x = residual(x, features, name)
            return attend(x, name) if x.shape[1] in o.attention else x

        x = Conv(o.channels, dtype=self.dtype, name="in")(x)
        skips = [x]
        for level, multiplier in enumerate(o.multipliers):
            if level:
                x = Conv(x.shape[-1], stride=2, dtype=self.dtype, name=f"down_{level}")(x)
                skips.append(x)
            for i in range(o.blocks):
                x = block(x, multiplier * o.channels, f"down_{level}_{i}")
                skips.append(x)

        x = residual(x, x.shape[-1], "middle_0")
        x = residual(attend(x, "middle"), x.shape[-1], "middle_1")

        for level, multiplier in reversed(list(enumerate(o.multipliers))):
            for i in range(o.blocks + 1):
                x = block(jnp.concatenate([x, skips.pop()], axis=-1), multiplier * o.channels, f"up_{level}_{i}")
            if level:
                x = Conv(x.shape[-1], dtype=self.dtype, name=f"up_{level}")(doubled(x))

        x = nn.silu(GroupNorm(name="out_norm")(x))
        return Conv(self.channels_out, dtype=jnp.float32, kernel_init=layers.ZEROS, name="out")(x)

    def condition(self, time: Array, label: Array | None) -> Array:
        """The embedding of time and label, [B or 1, 4 channels], past its last nonlinearity."""
        width = 4 * self.options.channels
        y = sinusoidal(1000.0 * time, self.options.channels).astype(self.dtype)
        y = nn.silu(Dense(width, self.dtype, name="time_in")(y))
        y = Dense(width, self.dtype, name="time_out")(y)
        if self.num_classes:
            table = self.param("label", nn.initializers.normal(0.02), (self.num_classes + 1, width))
            y = y + table[label].astype(self.dtype)
        return nn.silu(y)


def sinusoidal(t: Array, features: int) -> Array:
    """Sines, then cosines, of t at `features` / 2 geometric frequencies from 1 to 1 / 10,000, both included.

    [n] -> [n, features]. The order and the last frequency differ from those of `layers.sinusoidal`.
    """
    half = features // 2
    frequencies = jnp.exp(-jnp.log(10_000.0) / (half - 1) * jnp.arange(half, dtype=jnp.float32))
    angles = t.astype(jnp.float32)[:, None] * frequencies[None]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class ResidualBlock(nn.Module):
    """x + conv(dropout(silu(norm(conv(silu(norm(x))) + condition)))), the last convolution starting at zero."""

    features: int
    dropout: float
    layer: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, condition: Array, keys: Array | None) -> Array:
        """[B,H,W,C], [B or 1,D] -> [B,H,W,features]."""
        y = Conv(self.features, dtype=self.dtype, name="conv_0")(nn.silu(GroupNorm(name="norm_0")(x)))
        y = add(y, Dense(self.features, self.dtype, name="condition")(condition))
        y = layers.dropout(nn.silu(GroupNorm(name="norm_1")(y)), self.dropout, keys, self.layer)
        y = Conv(self.features, dtype=self.dtype, kernel_init=layers.ZEROS, name="conv_1")(y)
        if x.shape[-1] != self.features:
            x = Conv(self.features, size=1, dtype=self.dtype, name="skip")(x)
        return x + y


def add(x: Array, vector: Array) -> Array:
    """[B,H,W,C] + [B or 1,C] in float32, in x's dtype.

    The vector's gradient is a sum over pixels: of 32x32 in bfloat16, it would be off by 17 %.
    """
    return (x.astype(jnp.float32) + layers.spread(vector.astype(jnp.float32), x.shape)).astype(x.dtype)


class Attention(nn.Module):
    """Single-head self-attention over all pixels, in a residual branch that starts at zero."""

    implementation: str
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B,H,W,C] -> the same."""
        B, H, W, C = x.shape
        y = GroupNorm(name="norm")(x).reshape(B, H * W, 1, C)
        q, k, v = (Dense(C, self.dtype, name=name)(y) for name in ("q", "k", "v"))
        y = attention.attention(q, k, v, self.implementation).reshape(B, H, W, C)
        return x + Dense(C, self.dtype, layers.ZEROS, name="out")(y)


def doubled(x: Array) -> Array:
    """[B,H,W,C] -> [B,2H,2W,C], each pixel repeated (the nearest neighbour)."""
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)


def size_error(options: Any, size: int) -> str:
    """Why a U-Net of `options` (`multipliers`, `attention`) cannot take images of `size` pixels, or "".

    A side of `attention` that the image has in no resolution is passed over, so that those of a paper's network hold
    for smaller images, too; but not one that halving never leads to.
    """
    halvings = len(options.multipliers) - 1
    if size % 2**halvings:
        return f"{len(options.multipliers)} multipliers halve the image {halvings} times, and {size} pixels cannot be"
    sides = [size >> level for level in range(size.bit_length())]
    absent = [side for side in options.attention if side <= size and side not in sides]
    return f"attention = {absent[0]} is none of {', '.join(map(str, sides))}" if absent else ""
