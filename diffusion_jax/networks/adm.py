"""OpenAI's U-Net: of iDDPM (Nichol & Dhariwal 2021), ADM (Dhariwal & Nichol 2021) and, on ImageNet-64, EDM.

DDPM's (`unet.py`) with four changes (Dhariwal & Nichol 2021, section 3):

    AdaGN(h, y) = (1 + y_scale) GroupNorm(h) + y_shift     instead of GroupNorm(h + y)
    attention of several heads, at several resolutions     instead of one head at one
    residual blocks that halve or double the image         instead of convolutions
    one embedding a class, added to the time's

As in openai/guided-diffusion; iDDPM's, in openai/improved-diffusion, keeps the convolutions. NVlabs/edm's ADM is the
same function of another time; its label's linear map without a bias is a table.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp

from diffusion_jax.networks import attention, layers, remat, unet
from diffusion_jax.networks.layers import Conv, Dense, GroupNorm
from diffusion_jax.types import Array

EPSILON = 1e-5  # of the norms


@dataclass(frozen=True, kw_only=True)
class ADMOptions:
    """Sizes of an ADM. The defaults are those for ImageNet at 64 pixels.

    Attributes:
      channels: a multiple of 32, the number of groups of the norms; a quarter of the condition's width.
      multipliers: of `channels` at each resolution, to give multiples of 32; every further one halves the image's side.
      blocks: residual blocks a resolution on the way down; one more on the way up.
      attention: sides, in pixels, at which the residual blocks are followed by attention.
      head_channels: of each head of the attentions, where `heads` is 0.
      heads: of each attention, however wide; 0 for as many as have `head_channels` channels.
      scale_shift_norm: whether the condition scales and shifts the second norm's output, or is added to its input.
      resblock_updown: whether residual blocks halve and double the image, or convolutions.
      time_scale: the sinusoids see `time_scale` * time: 1000 for a time in [0, 1], 1 for EDM's ln(sigma) / 4.
      dropout: probability inside the residual blocks.
      remat: from `remat.POLICIES`, what the backward pass keeps of each block.
      attention_implementation: from `attention.IMPLEMENTATIONS`, or "auto".
    """

    channels: int = 192
    multipliers: tuple = (1, 2, 3, 4)
    blocks: int = 3
    attention: tuple = (32, 16, 8)
    head_channels: int = 64
    heads: int = 0
    scale_shift_norm: bool = True
    resblock_updown: bool = True
    time_scale: float = 1000.0
    dropout: float = 0.1
    remat: str = "none"
    attention_implementation: str = "auto"

    def __post_init__(self) -> None:
        unet.check_sizes(self)
        if not self.multipliers or any(not self._fits(m) for m in self.multipliers):
            raise ValueError(f"multipliers must give multiples of 32 channels, not {self.multipliers}")
        if self.head_channels < 1 or self.heads < 0:
            raise ValueError("head_channels must be at least 1, and heads at least 0")
        if not 0.0 < self.time_scale < float("inf"):
            raise ValueError(f"time_scale must be positive, not {self.time_scale}")

    def _fits(self, multiplier: float) -> bool:
        return isinstance(multiplier, int | float) and multiplier > 0 and self.channels * multiplier % 32 == 0

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels at each resolution."""
        return tuple(int(self.channels * multiplier) for multiplier in self.multipliers)


class ADM(nn.Module):
    """Down, middle, up."""

    options: ADMOptions
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

        def residual(x: Array, features: int, name: str, resample: Callable[[Array], Array] | None = None) -> Array:
            block = residual_block(o, features, next(layer), self.dtype, resample, name=name)
            return block(x, condition, keys)

        def attend(x: Array, name: str) -> Array:
            heads = o.heads or x.shape[-1] // o.head_channels
            return attention_block(heads, o.attention_implementation, self.dtype, name=f"{name}_attention")(x)

        def block(x: Array, features: int, name: str) -> Array:
            x = residual(x, features, name)
            return attend(x, name) if x.shape[1] in o.attention else x

        def down(x: Array, name: str) -> Array:
            if o.resblock_updown:
                return residual(x, x.shape[-1], name, halved)
            # Around the pixels 0, 2, 4, ..., as in torch; DDPM, which pads below and right alone, has 1, 3, 5, ...
            return Conv(x.shape[-1], 3, 2, 1, self.dtype, layers.UNIFORM, name=name)(x)

        def up(x: Array, name: str) -> Array:
            if o.resblock_updown:
                return residual(x, x.shape[-1], name, unet.doubled)
            return Conv(x.shape[-1], dtype=self.dtype, kernel_init=layers.UNIFORM, name=name)(unet.doubled(x))

        x = Conv(o.widths[0], dtype=self.dtype, kernel_init=layers.UNIFORM, name="in")(x)
        skips = [x]
        for level, features in enumerate(o.widths):
            if level:
                x = down(x, f"down_{level}")
                skips.append(x)
            for i in range(o.blocks):
                x = block(x, features, f"down_{level}_{i}")
                skips.append(x)

        x = residual(x, x.shape[-1], "middle_0")
        x = residual(attend(x, "middle"), x.shape[-1], "middle_1")

        for level, features in reversed(list(enumerate(o.widths))):
            for i in range(o.blocks + 1):
                x = block(jnp.concatenate([x, skips.pop()], axis=-1), features, f"up_{level}_{i}")
            if level:
                x = up(x, f"up_{level}")

        x = nn.silu(GroupNorm(epsilon=EPSILON, name="out_norm")(x))
        return Conv(self.channels_out, dtype=jnp.float32, kernel_init=layers.ZEROS, name="out")(x)

    def condition(self, time: Array, label: Array | None) -> Array:
        """The embedding of time and label, [B or 1, 4 channels], past its last nonlinearity."""
        o, width = self.options, 4 * self.options.channels
        y = layers.sinusoidal(o.time_scale * time, o.channels).astype(self.dtype)
        y = nn.silu(Dense(width, self.dtype, layers.UNIFORM, name="time_in")(y))
        y = Dense(width, self.dtype, layers.UNIFORM, name="time_out")(y)
        if self.num_classes:
            table = self.param("label", nn.initializers.normal(1.0), (self.num_classes, width))
            # The label "none" lies outside of the table, and adds 0.
            y = y + jnp.take(table, label, axis=0, mode="fill", fill_value=0.0).astype(self.dtype)
        return nn.silu(y)


class ResidualBlock(nn.Module):
    """x + conv(dropout(silu(AdaGN(conv(silu(norm(x))), condition)))), the last convolution starting at zero.

    `resample` halves or doubles x, and the first norm's output before its convolution.
    """

    options: ADMOptions
    features: int
    layer: int
    dtype: jnp.dtype
    resample: Callable[[Array], Array] | None = None

    @nn.compact
    def __call__(self, x: Array, condition: Array, keys: Array | None) -> Array:
        """[B,H,W,C], [B or 1,D] -> [B,H',W',features]."""
        o = self.options
        y = nn.silu(GroupNorm(epsilon=EPSILON, name="norm_0")(x))
        if self.resample:
            x, y = self.resample(x), self.resample(y)
        y = Conv(self.features, dtype=self.dtype, kernel_init=layers.UNIFORM, name="conv_0")(y)

        y = nn.silu(self.norm_under(condition, y))
        y = layers.dropout(y, o.dropout, keys, self.layer)
        y = Conv(self.features, dtype=self.dtype, kernel_init=layers.ZEROS, name="conv_1")(y)
        if x.shape[-1] != self.features:
            x = Conv(self.features, size=1, dtype=self.dtype, kernel_init=layers.UNIFORM, name="skip")(x)
        return x + y

    def norm_under(self, condition: Array, y: Array) -> Array:
        """AdaGN(y, condition) with `scale_shift_norm`, else GroupNorm(y + condition)."""
        norm = GroupNorm(epsilon=EPSILON, name="norm_1")
        if not self.options.scale_shift_norm:
            return norm(unet.add(y, Dense(self.features, self.dtype, layers.UNIFORM, name="condition")(condition)))
        vectors = Dense(2 * self.features, self.dtype, layers.UNIFORM, name="condition")(condition)
        # In float32 for the gradients of scale and shift, as in `unet.add`.
        scale, shift = (layers.spread(v, y.shape) for v in jnp.split(vectors.astype(jnp.float32), 2, axis=-1))
        return ((1.0 + scale) * norm(y).astype(jnp.float32) + shift).astype(y.dtype)


class Attention(nn.Module):
    """Self-attention over all pixels, in a residual branch that starts at zero.

    The columns of `qkv` are all queries, then all keys, then all values, each head by head. Published weights have
    that order where `use_new_attention_order` is set (ADM at 64 pixels); elsewhere q, k and v of one head stand side by
    side, in NVlabs/edm even of one channel.
    """

    heads: int
    implementation: str
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B,H,W,C] -> the same."""
        B, H, W, C = x.shape
        y = GroupNorm(epsilon=EPSILON, name="norm")(x)
        y = Dense(3 * C, self.dtype, layers.UNIFORM, name="qkv")(y).reshape(B, H * W, 3, self.heads, -1)
        y = attention.attention(*jnp.moveaxis(y, 2, 0), self.implementation).reshape(B, H, W, C)
        return x + Dense(C, self.dtype, layers.ZEROS, name="out")(y)


def halved(x: Array) -> Array:
    """[B,H,W,C] -> [B,H/2,W/2,C], the means of 2x2 pixels."""
    B, H, W, C = x.shape
    return jnp.mean(x.reshape(B, H // 2, 2, W // 2, 2, C), axis=(2, 4))


def size_error(options: ADMOptions, size: int) -> str:
    """Why images of `size` pixels cannot be halved, or attended to, as `options` ask, or ""."""
    attended = [width for level, width in enumerate(options.widths) if size >> level in options.attention]
    name = "heads" if options.heads else "head_channels"
    divisor = getattr(options, name)
    for width in (*attended, options.widths[-1]):
        if width % divisor:
            return f"{name} = {divisor} must divide the {width} channels of an attention"
    return unet.size_error(options, size)
