"""The DDPM U-Net (Ho et al. 2020, appendix B): residual blocks, attention at chosen resolutions, skips."""

from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp

from diffusion_jax.networks import layers
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
    """

    channels: int = 128
    multipliers: tuple = (1, 2, 2, 2)
    blocks: int = 2
    attention: tuple = (16,)
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.channels < 32 or self.channels % 32:
            raise ValueError(f"channels must be a multiple of 32, not {self.channels}")
        if not self.multipliers or any(not isinstance(m, int) or m < 1 for m in self.multipliers):
            raise ValueError(f"multipliers must be whole numbers of at least 1, not {self.multipliers}")
        if any(not isinstance(side, int) or side < 1 for side in self.attention):
            raise ValueError(f"attention must be whole numbers of pixels, not {self.attention}")
        if self.blocks < 1:
            raise ValueError(f"blocks must be at least 1, not {self.blocks}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must lie in [0, 1), not {self.dropout}")


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
        layer = iter(range(1000))

        def residual(x: Array, multiplier: int, name: str) -> Array:
            block = ResidualBlock(multiplier * o.channels, o.dropout, next(layer), self.dtype, name=name)
            x = block(x, condition, keys)
            return Attention(self.dtype, name=f"{name}_attention")(x) if x.shape[1] in o.attention else x

        x = Conv(o.channels, dtype=self.dtype, name="in")(x)
        skips = [x]
        for level, multiplier in enumerate(o.multipliers):
            if level:
                x = Conv(x.shape[-1], stride=2, dtype=self.dtype, name=f"down_{level}")(x)
                skips.append(x)
            for i in range(o.blocks):
                x = residual(x, multiplier, f"down_{level}_{i}")
                skips.append(x)

        middle = o.multipliers[-1] * o.channels
        x = ResidualBlock(middle, o.dropout, next(layer), self.dtype, name="middle_0")(x, condition, keys)
        x = Attention(self.dtype, name="middle_attention")(x)
        x = ResidualBlock(middle, o.dropout, next(layer), self.dtype, name="middle_1")(x, condition, keys)

        for level, multiplier in reversed(list(enumerate(o.multipliers))):
            for i in range(o.blocks + 1):
                x = residual(jnp.concatenate([x, skips.pop()], axis=-1), multiplier, f"up_{level}_{i}")
            if level:
                x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)  # nearest neighbour
                x = Conv(x.shape[-1], dtype=self.dtype, name=f"up_{level}")(x)

        x = nn.silu(GroupNorm(name="out_norm")(x))
        return Conv(self.channels_out, dtype=jnp.float32, kernel_init=layers.ZEROS, name="out")(x)

    def condition(self, time: Array, label: Array | None) -> Array:
        """The embedding of time and label, [B or 1, 4 channels], past its last nonlinearity."""
        width = 4 * self.options.channels
        y = layers.sinusoidal(1000.0 * time, self.options.channels).astype(self.dtype)
        y = nn.silu(Dense(width, self.dtype, name="time_in")(y))
        y = Dense(width, self.dtype, name="time_out")(y)
        if self.num_classes:
            table = self.param("label", nn.initializers.normal(0.02), (self.num_classes + 1, width))
            y = y + table[label].astype(self.dtype)
        return nn.silu(y)


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
        y = y + Dense(self.features, self.dtype, name="condition")(condition)[:, None, None]
        y = layers.dropout(nn.silu(GroupNorm(name="norm_1")(y)), self.dropout, keys, self.layer)
        y = Conv(self.features, dtype=self.dtype, kernel_init=layers.ZEROS, name="conv_1")(y)
        if x.shape[-1] != self.features:
            x = Conv(self.features, size=1, dtype=self.dtype, name="skip")(x)
        return x + y


class Attention(nn.Module):
    """Single-head self-attention over all pixels, in a residual branch that starts at zero."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B,H,W,C] -> the same."""
        B, H, W, C = x.shape
        y = GroupNorm(name="norm")(x).reshape(B, H * W, 1, C)
        q, k, v = (Dense(C, self.dtype, name=name)(y) for name in ("q", "k", "v"))
        y = layers.attention(q, k, v).reshape(B, H, W, C)
        return x + Dense(C, self.dtype, layers.ZEROS, name="out")(y)


def size_error(options: UNetOptions, size: int) -> str:
    """Why images of `size` pixels cannot be halved as often as `options` ask, or ""."""
    halvings = len(options.multipliers) - 1
    if size % 2**halvings == 0:
        return ""
    return f"{len(options.multipliers)} multipliers halve the image {halvings} times, and {size} pixels cannot be"
