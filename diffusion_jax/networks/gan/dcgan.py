"""DCGAN (Radford et al. 2016, section 3 and Figure 1): strided convolutions, no pooling, no hidden dense layers.

    G: z -> 4x4 -> norm, relu -> [transposed convolution that doubles, norm, relu] ... -> tanh
    D: [convolution that halves, norm, leaky relu] ... -> 4x4 -> logit        the first without norm

Channels halve where the side doubles. Where the paper has batch norm, this has group norm: an image must not depend on
those beside it, and the gradient penalties differentiate D(x_i) by x_i alone. Classes are ours: the generator's come in
beside z (Mirza & Osindero 2014), the discriminator's by projection (Miyato & Koyama 2018, eq. 8).
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_jax.networks import layers
from diffusion_jax.networks.convolution import convolve
from diffusion_jax.networks.layers import Conv, Dense, GroupNorm
from diffusion_jax.types import Array, ImageSpec

NORMAL = nn.initializers.normal(0.02)


@dataclass(frozen=True, kw_only=True)
class GeneratorOptions:
    """Sizes of the generator. The defaults are the paper's for 64 pixels.

    Attributes:
      latent: numbers in z.
      width: channels before the last layer; twice as many at each halving of the side. 4, 8, 16, or a multiple of 32.
    """

    latent: int = 100
    width: int = 128

    def __post_init__(self) -> None:
        if self.latent < 1:
            raise ValueError(f"latent must be at least 1, not {self.latent}")
        check_width(self.width)


@dataclass(frozen=True, kw_only=True)
class DiscriminatorOptions:
    """Sizes of the discriminator. The defaults are the paper's for 64 pixels.

    Attributes:
      width: channels after the first layer; twice as many at each halving of the side. 4, 8, 16, or a multiple of 32.
      norm: group norm after each convolution but the first, in batch norm's place.
    """

    width: int = 128
    norm: bool = True

    def __post_init__(self) -> None:
        check_width(self.width)


def check_width(width: int) -> None:
    """Raise a ValueError for a number of channels that group norm's groups do not divide."""
    if width not in (4, 8, 16) and (width < 32 or width % 32):
        raise ValueError(f"width must be 4, 8, 16 or a multiple of 32, not {width}")


def size_error(options: Any, size: int) -> str:
    """Why images of `size` pixels cannot be halved down to 4, or ""."""
    fine = size >= 8 and size & (size - 1) == 0
    return "" if fine else f"the image's side must be a power of two from 8 on, and {size} is not"


def halvings(size: int) -> int:
    """How often a side of `size` = 4 x 2^n pixels is halved down to 4: n."""
    return size.bit_length() - 3


class Generator(nn.Module):
    """z to an image, through ever larger grids."""

    options: GeneratorOptions
    spec: ImageSpec
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, z: Array, label: Array | None, keys: Array | None) -> Array:
        """[n,latent], i32[n] -> [n,H,W,C] in [-1, 1]. Nothing is drawn: `keys` are not looked at."""
        levels = halvings(self.spec.size)
        if label is not None:
            classes = jax.nn.one_hot(label, self.spec.num_classes)
            z = jnp.concatenate([z, Dense(self.options.latent, bias=False, name="label")(classes)], axis=-1)
        widths = [self.options.width * 2**level for level in reversed(range(levels))]
        x = Dense(16 * widths[0], self.dtype, NORMAL, name="in")(z).reshape(-1, 4, 4, widths[0])
        x = nn.relu(GroupNorm(name="norm_0")(x))
        for level, width in enumerate(widths[1:], 1):
            x = TransposedConv(width, self.dtype, name=f"up_{level}")(x)
            x = nn.relu(GroupNorm(name=f"norm_{level}")(x))
        return jnp.tanh(TransposedConv(self.spec.channels, self.dtype, name="out")(x))


class Discriminator(nn.Module):
    """An image to a logit, through ever smaller grids."""

    options: DiscriminatorOptions
    spec: ImageSpec
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, label: Array | None) -> Array:
        """[n,H,W,C], i32[n] -> [n]."""
        for level in range(halvings(self.spec.size)):
            width = self.options.width * 2**level
            x = Conv(width, 4, 2, 1, self.dtype, NORMAL, name=f"down_{level}")(x)
            if level and self.options.norm:
                x = GroupNorm(name=f"norm_{level}")(x)
            x = nn.leaky_relu(x, 0.2)
        return Projection(self.spec.num_classes, self.dtype, name="out")(x.reshape(len(x), -1), label)


class TransposedConv(nn.Module):
    """The transpose of a 4x4 convolution with stride 2: doubles the side. The bias is added in float32."""

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B,H,W,C] -> [B,2H,2W,features]."""
        kernel = self.param("kernel", NORMAL, (4, 4, x.shape[-1], self.features)).astype(self.dtype)
        bias = self.param("bias", layers.ZEROS, (self.features,))
        y = convolve(x.astype(self.dtype), kernel, padding=2, image_dilation=2)
        return (y.astype(jnp.float32) + layers.spread(bias[None], y.shape)).astype(self.dtype)


class Projection(nn.Module):
    """The logit w h + b + v_y h of features h, where there is a class y (Miyato & Koyama 2018, eq. 8), in float32."""

    num_classes: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, h: Array, label: Array | None) -> Array:
        """[n,D], i32[n] -> f32[n]."""
        logit = Dense(1, self.dtype, name="logit")(h).astype(jnp.float32)[:, 0]
        if label is None:
            return logit
        v = Dense(h.shape[-1], bias=False, name="label")(jax.nn.one_hot(label, self.num_classes))
        return logit + jnp.sum(v * h.astype(jnp.float32), axis=-1)
