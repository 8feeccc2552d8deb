"""VDM's score network (Kingma et al. 2021; google-research/vdm, model_vdm.py).

A U-Net that never changes the resolution: what a likelihood counts is fine detail. For the same reason it sees, beside
the image, sines and cosines of it that tell where between two grey levels a pixel lies. Its last layer begins at zero
and is added to the input, which at a high noise level is the noise that it is to predict.
"""

import itertools
import math
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_jax.networks import attention, layers, remat, unet
from diffusion_jax.networks.layers import Conv, Dense, GroupNorm
from diffusion_jax.types import Array, ImageSpec

LECUN = nn.initializers.lecun_normal()


@dataclass(frozen=True, kw_only=True)
class VDMOptions:
    """Sizes of a VDM. The defaults are those of the published code's config for CIFAR-10.

    Attributes:
      channels: of every layer; a multiple of 32, the number of groups of the norms.
      depth: residual blocks on the way in; one more on the way out.
      attention: whether each block is followed by attention, as in the paper's model for augmented data. The middle
        always has one.
      fourier: frequencies of the input's sines and cosines, in periods per unit. 8-bit images in [-1, 1] have their
        grey levels 2/255 apart: the default is half a period and a whole one a level, as published, where images
        are scaled such that levels are 2/256 apart and the frequencies are 64 and 128.
      dropout: probability inside the residual blocks.
      remat: from `remat.POLICIES`, what the backward pass keeps of each block.
      attention_implementation: from `attention.IMPLEMENTATIONS`, or "auto".
    """

    channels: int = 128
    depth: int = 32
    attention: bool = False
    fourier: tuple = (63.75, 127.5)
    dropout: float = 0.1
    remat: str = "none"
    attention_implementation: str = "auto"

    def __post_init__(self) -> None:
        if self.channels < 32 or self.channels % 32:
            raise ValueError(f"channels must be a multiple of 32, not {self.channels}")
        if self.depth < 1:
            raise ValueError(f"depth must be at least 1, not {self.depth}")
        if any(not isinstance(f, int | float) or not 0.0 < f < math.inf for f in self.fourier):
            raise ValueError(f"fourier must be positive numbers, not {self.fourier}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must lie in [0, 1), not {self.dropout}")
        remat.check(self.remat)
        attention.check(self.attention_implementation)


class VDM(nn.Module):
    """In, middle, out, with a skip from each block on the way in to one on the way out."""

    options: VDMOptions
    channels_out: int
    num_classes: int  # 0: no label; the label `num_classes` itself stands for "none"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, time: Array, label: Array | None, keys: Array | None) -> Array:
        """See `networks.Network.apply`."""
        o = self.options
        condition = self.condition(time, label)
        layer = itertools.count()
        residual_block, attention_block = remat.block(ResidualBlock, o.remat), remat.block(unet.Attention, o.remat)

        def residual(h: Array, name: str, attends: bool) -> Array:
            h = residual_block(o.channels, o.dropout, next(layer), self.dtype, name=name)(h, condition, keys)
            if attends:
                h = attention_block(o.attention_implementation, self.dtype, name=f"{name}_attention")(h)
            return h

        h = jnp.concatenate([x, fourier(x, o.fourier)], axis=-1)
        h = Conv(o.channels, dtype=self.dtype, kernel_init=LECUN, name="in")(h)
        skips = [h]
        for i in range(o.depth):
            h = residual(h, f"down_{i}", o.attention)
            skips.append(h)

        h = residual(h, "middle_0", attends=True)
        h = residual(h, "middle_1", attends=False)

        for i in range(o.depth + 1):
            h = residual(jnp.concatenate([h, skips.pop()], axis=-1), f"up_{i}", o.attention)

        h = nn.silu(GroupNorm(name="out_norm")(h))
        y = Conv(self.channels_out, dtype=jnp.float32, kernel_init=layers.ZEROS, name="out")(h)
        own = min(self.channels_out, x.shape[-1])  # a learned variance has channels that no input belongs to
        return y.at[..., :own].add(x[..., :own])

    def condition(self, time: Array, label: Array | None) -> Array:
        """The embedding of time and label, [B or 1, 4 channels], past its last nonlinearity.

        The paper's code gives the network one number beside the time, which is 0 for CIFAR-10. Here it is the label's
        one-hot vector, zeros for none, and the 0 where there are no classes.
        """
        o = self.options
        beside = jnp.zeros((1, 1)) if label is None else jax.nn.one_hot(label, self.num_classes)
        parts = unet.sinusoidal(1000.0 * time, o.channels), beside
        rows = max(len(part) for part in parts)
        y = jnp.concatenate([jnp.broadcast_to(part, (rows, part.shape[-1])) for part in parts], axis=-1)
        y = nn.silu(Dense(4 * o.channels, self.dtype, LECUN, name="condition_in")(y))
        return nn.silu(Dense(4 * o.channels, self.dtype, LECUN, name="condition_out")(y))

    @staticmethod
    def fixed(options: VDMOptions, image: ImageSpec) -> int:
        """2: the published count includes the ends of the noise schedule, which belong to the schedule here."""
        return 2


class ResidualBlock(nn.Module):
    """x + conv(dropout(silu(norm(conv(silu(norm(x))) + W condition)))), W and the last convolution starting at zero."""

    features: int
    dropout: float
    layer: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, condition: Array, keys: Array | None) -> Array:
        """[B,H,W,C], [B or 1,D] -> [B,H,W,features]."""
        y = nn.silu(GroupNorm(name="norm_0")(x))
        y = Conv(self.features, dtype=self.dtype, kernel_init=LECUN, name="conv_0")(y)
        W = Dense(self.features, self.dtype, layers.ZEROS, bias=False, name="condition")
        y = unet.add(y, W(condition))
        y = layers.dropout(nn.silu(GroupNorm(name="norm_1")(y)), self.dropout, keys, self.layer)
        y = Conv(self.features, dtype=self.dtype, kernel_init=layers.ZEROS, name="conv_1")(y)
        if x.shape[-1] != self.features:
            x = Dense(self.features, self.dtype, LECUN, name="skip")(x)
        return x + y


def fourier(x: Array, frequencies: tuple[float, ...]) -> Array:
    """sin(2 pi f x), then cos(2 pi f x), at every f for each channel: [..., C] -> f32[..., 2 C len(f)]."""
    f = 2.0 * math.pi * jnp.array(frequencies, jnp.float32)
    angles = (x.astype(jnp.float32)[..., None] * f.reshape((1,) * x.ndim + f.shape)).reshape(*x.shape[:-1], -1)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def any_size(options: VDMOptions, size: int) -> str:
    """Nothing is wrong with any size."""
    return ""
