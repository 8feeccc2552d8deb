"""Residual GAN networks with a projection discriminator: SNGAN's (Miyato et al. 2018), as BigGAN grew them.

    G: z -> 4x4 -> [block that doubles] ... -> norm, relu, convolution, tanh
    D: [block that halves] ... [block] ... -> relu, sum over pixels = h -> w h + b + v_y h

    block of G:  up(skip(x)) + conv(relu(norm(conv(up(relu(norm(x)))))))
    block of D:  down(skip(x)) + down(conv(relu(conv(relu(x)))))          the first begins with conv, not with relu
    norm(x) = (1 + scale(c)) GroupNorm(x) + shift(c),   c = (z, embedding of y)

skip is a 1x1 convolution, and nothing in a block that keeps size and width. The defaults are the networks for CIFAR-10
of Miyato et al. 2018, Table 4, with the projection of Miyato & Koyama 2018; a norm that also sees z is BigGAN-deep's
(Brock et al. 2019, appendix B). Batch norm is group norm here: an image must not depend on those beside it. Spectral
normalisation is no part of a network: `adversarial.spectral` gives it to any.
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_jax.networks import attention, layers
from diffusion_jax.networks.adm import halved
from diffusion_jax.networks.gan import dcgan
from diffusion_jax.networks.gan.dcgan import Projection
from diffusion_jax.networks.layers import Conv, Dense, GroupNorm
from diffusion_jax.networks.unet import doubled
from diffusion_jax.types import Array, ImageSpec

NORMAL = nn.initializers.normal(0.02)


@dataclass(frozen=True, kw_only=True)
class GeneratorOptions:
    """Sizes of the generator.

    Attributes:
      latent: numbers in z.
      width: channels at full size. 4, 8, 16, or a multiple of 32.
      multipliers: of `width` in the blocks, from 4x4 up; one for each doubling of the side.
      embedding: numbers that stand for a class.
      attention: side in pixels at which self-attention follows a block (Zhang et al. 2019); 0 for none.
    """

    latent: int = 128
    width: int = 256
    multipliers: tuple = (1, 1, 1)
    embedding: int = 128
    attention: int = 0

    def __post_init__(self) -> None:
        if min(self.latent, self.embedding) < 1:
            raise ValueError("latent and embedding must be at least 1")
        check(self)


@dataclass(frozen=True, kw_only=True)
class DiscriminatorOptions:
    """Sizes of the discriminator.

    Attributes:
      width: channels that `multipliers` multiply. 4, 8, 16, or a multiple of 32.
      multipliers: of `width` in the blocks that halve the side, from the image down.
      blocks: more blocks, which do not halve.
      attention: side in pixels at which self-attention follows a block; 0 for none.
    """

    width: int = 128
    multipliers: tuple = (1, 1)
    blocks: int = 2
    attention: int = 0

    def __post_init__(self) -> None:
        if self.blocks < 0:
            raise ValueError(f"blocks must not be negative, but {self.blocks} is")
        check(self)


def check(options: Any) -> None:
    """Raise a ValueError for widths or sides of attention that no network has."""
    dcgan.check_width(options.width)
    if not options.multipliers or any(not isinstance(m, int) or m < 1 for m in options.multipliers):
        raise ValueError(f"multipliers must be whole numbers of at least 1, not {options.multipliers}")
    for channels in (options.width * m for m in options.multipliers):
        if channels > 128 and channels % 32:
            raise ValueError(f"more than 128 channels must be a multiple of 32, and {channels} are not")
    if options.attention < 0:
        raise ValueError(f"attention must be a side in pixels, or 0, not {options.attention}")


def generator_size_error(options: GeneratorOptions, size: int) -> str:
    """Why the generator of `options` does not make images of `size` pixels, or ""."""
    levels = len(options.multipliers)
    if size != 4 * 2**levels:
        return f"{levels} multipliers double a side of 4 to {4 * 2**levels} pixels, not to {size}"
    return _attention_error(options.attention, [8 << level for level in range(levels)])


def discriminator_size_error(options: DiscriminatorOptions, size: int) -> str:
    """Why the discriminator of `options` does not take images of `size` pixels, or ""."""
    levels = len(options.multipliers)
    if size % 2**levels:
        return f"{levels} multipliers halve the image {levels} times, and {size} pixels cannot be"
    return _attention_error(options.attention, [size >> level for level in range(1, levels + 1)])


def _attention_error(side: int, sides: list[int]) -> str:
    return "" if side in (0, *sides) else f"attention = {side} is none of the sides {', '.join(map(str, sides))}"


class Generator(nn.Module):
    """z to an image, through residual blocks that double its side."""

    options: GeneratorOptions
    spec: ImageSpec
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, z: Array, label: Array | None, keys: Array | None) -> Array:
        """[n,latent], i32[n] -> [n,H,W,C] in [-1, 1]. Nothing is drawn: `keys` are not looked at."""
        o = self.options
        condition = z
        if label is not None:
            classes = jax.nn.one_hot(label, self.spec.num_classes)
            condition = jnp.concatenate([z, Dense(o.embedding, bias=False, name="label")(classes)], axis=-1)
        first = o.width * o.multipliers[0]
        x = Dense(16 * first, self.dtype, name="in")(condition).reshape(-1, 4, 4, first)
        for level, multiplier in enumerate(o.multipliers):
            x = UpBlock(o.width * multiplier, self.dtype, name=f"up_{level}")(x, condition)
            if x.shape[1] == o.attention:
                x = SelfAttention(self.dtype, name="attention")(x)
        x = nn.relu(ConditionalNorm(self.dtype, name="norm")(x, condition))
        return jnp.tanh(Conv(self.spec.channels, dtype=self.dtype, name="out")(x))


class Discriminator(nn.Module):
    """An image to a logit, through residual blocks that halve its side. No norm."""

    options: DiscriminatorOptions
    spec: ImageSpec
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, label: Array | None) -> Array:
        """[n,H,W,C], i32[n] -> [n]."""
        o = self.options
        for level, multiplier in enumerate(o.multipliers):
            x = DownBlock(o.width * multiplier, level > 0, True, self.dtype, name=f"down_{level}")(x)
            if x.shape[1] == o.attention:
                x = SelfAttention(self.dtype, name="attention")(x)
        for i in range(o.blocks):
            x = DownBlock(x.shape[-1], True, False, self.dtype, name=f"block_{i}")(x)
        h = jnp.sum(nn.relu(x).astype(jnp.float32), axis=(1, 2))
        return Projection(self.spec.num_classes, self.dtype, name="out")(h, label)


class UpBlock(nn.Module):
    """up(skip(x)) + conv(relu(norm(conv(up(relu(norm(x)))))))."""

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, condition: Array) -> Array:
        """[n,H,W,C], [n,D] -> [n,2H,2W,features]."""
        y = nn.relu(ConditionalNorm(self.dtype, name="norm_0")(x, condition))
        y = Conv(self.features, dtype=self.dtype, name="conv_0")(doubled(y))
        y = nn.relu(ConditionalNorm(self.dtype, name="norm_1")(y, condition))
        y = Conv(self.features, dtype=self.dtype, name="conv_1")(y)
        return doubled(Conv(self.features, size=1, dtype=self.dtype, name="skip")(x)) + y


class DownBlock(nn.Module):
    """down(skip(x)) + down(conv(relu(conv(relu(x))))), `activated` for the first relu."""

    features: int
    activated: bool
    halve: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[n,H,W,C] -> [n,H/2,W/2,features], or [n,H,W,features] without `halve`."""
        y = Conv(self.features, dtype=self.dtype, name="conv_0")(nn.relu(x) if self.activated else x)
        y = Conv(self.features, dtype=self.dtype, name="conv_1")(nn.relu(y))
        if self.halve or x.shape[-1] != self.features:
            x = Conv(self.features, size=1, dtype=self.dtype, name="skip")(x)
        return halved(x + y) if self.halve else x + y


class ConditionalNorm(nn.Module):
    """(1 + scale(c)) GroupNorm(x) + shift(c), both linear in c, added in float32."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, condition: Array) -> Array:
        """[n,H,W,C], [n,D] -> [n,H,W,C]."""
        vectors = Dense(2 * x.shape[-1], self.dtype, NORMAL, bias=False, name="condition")(condition)
        scale, shift = (layers.spread(v, x.shape) for v in jnp.split(vectors.astype(jnp.float32), 2, axis=-1))
        return ((1.0 + scale) * GroupNorm(name="norm")(x).astype(jnp.float32) + shift).astype(x.dtype)


class SelfAttention(nn.Module):
    """x + gain * attention over all pixels, the gain from 0 on (Zhang et al. 2019, eq. 1 to 3).

    Queries and keys have an eighth of the channels, at least 1. What differs: products of queries and keys are divided
    by the root of that number, which eq. 1 does not; values have all channels, and nothing is pooled, where the
    published code halves them and pools keys and values by 2x2.
    """

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[n,H,W,C] -> the same."""
        n, H, W, C = x.shape
        flat = x.reshape(n, H * W, 1, C)
        q, k = (Dense(max(C // 8, 1), self.dtype, bias=False, name=name)(flat) for name in ("q", "k"))
        v = Dense(C, self.dtype, bias=False, name="v")(flat)
        y = attention.attention(q, k, v, "exact").reshape(n, H, W, C)
        y = Dense(C, self.dtype, bias=False, name="out")(y)
        gain = self.param("gain", layers.ZEROS, ())  # in float32, as other affines: its gradient is one long sum
        return (x.astype(jnp.float32) + gain * y.astype(jnp.float32)).astype(x.dtype)
