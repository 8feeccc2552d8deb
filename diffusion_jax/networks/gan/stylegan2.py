"""StyleGAN2 (Karras et al. 2020, "Analyzing and improving the image quality of StyleGAN").

    w       = f(z / rms(z))                                 mapping, 8 dense layers
    s       = A(w)                                          a style for each convolution
    w'_ijk  = s_i w_ijk                                     modulation, eq. 1
    w''_ijk = w'_ijk / sqrt(sum_ik w'_ijk^2 + 1e-8)         demodulation, eq. 3
    x      <- sqrt(2) lrelu(w'' * x + strength noise + b)   section 2.2
    image   = sum over resolutions of toRGB(x), doubled     skip generator, section 4.1
    x      <- (skip(x) + branch(x)) / sqrt(2)               residual discriminator, section 4.1

Every weight begins as N(0, 1) and is divided by the square root of its number of inputs where it is used, so that one
learning rate suits all of them (equalised learning rate, Karras et al. 2018, section 4.1). The mapping learns 100 times
more slowly: its weights begin 100 times as large, and their products are divided by 100.

Karras et al. also regularise the length of paths, mix styles and clip activations of 16 bits; those are none of the
network's affairs here: the first two belong to a loss, and bfloat16 has float32's range.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_jax import rng
from diffusion_jax.networks import layers
from diffusion_jax.networks.convolution import convolve
from diffusion_jax.networks.ddpmpp import doubled, filtered, halved
from diffusion_jax.networks.gan import dcgan
from diffusion_jax.types import Array, ImageSpec

TAPS = (1, 3, 3, 1)
"""The filter, along one axis, with which images and activations are doubled and halved."""

MAPPING_RATE = 0.01
"""Learning rate of the mapping's layers over that of all others."""

EPSILON = 1e-8
SQRT_2 = math.sqrt(2.0)


@dataclass(frozen=True, kw_only=True)
class GeneratorOptions:
    """Sizes. At 1024 pixels the defaults have 30,370,060 parameters; at 256, with `channels_base=16384`, 24,767,458.

    Attributes:
      latent: numbers in z.
      style: numbers in w.
      mapping_layers: dense layers from z to w.
      channels_base: channels at a resolution times its side in pixels, as far as `channels_max` lets them.
      channels_max: the most channels at a resolution.
    """

    latent: int = 512
    style: int = 512
    mapping_layers: int = 8
    channels_base: int = 32768
    channels_max: int = 512

    def __post_init__(self) -> None:
        check_positive(self)


@dataclass(frozen=True, kw_only=True)
class DiscriminatorOptions:
    """Sizes. At 1024 pixels the defaults have 29,012,513 parameters; at 256, with `channels_base=16384`, 24,001,089.

    Attributes:
      mapping_layers: dense layers that embed a label; none without classes.
      group: examples over which the minibatch standard deviation is taken, as far as the batch can be divided so.
      channels_base: as of the generator.
      channels_max: as of the generator.
    """

    mapping_layers: int = 8
    group: int = 4
    channels_base: int = 32768
    channels_max: int = 512

    def __post_init__(self) -> None:
        check_positive(self)


def check_positive(options: Any) -> None:
    """Raise a ValueError unless all fields of the dataclass `options` are at least 1."""
    for name, value in vars(options).items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")


def size_error(options: Any, size: int) -> str:
    """Why there is no network of `options` (`channels_base`) for images of `size` pixels, or ""."""
    if problem := dcgan.size_error(options, size):
        return problem
    enough = options.channels_base >= size
    return "" if enough else f"channels_base must be at least {size}, the image's side, not {options.channels_base}"


def channels(options: Any, side: int) -> int:
    """Channels at the resolution `side`, for `options` with `channels_base` and `channels_max`."""
    return min(options.channels_base // side, options.channels_max)


# ---------------------------------------------------------------------------------------------- generator


class Generator(nn.Module):
    """G(z) = synthesis(mapping(z))."""

    options: GeneratorOptions
    spec: ImageSpec
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        """The two parts."""
        o = self.options
        self.mapping_network = Mapping(o.style, o.mapping_layers, self.spec.num_classes)
        self.synthesis_network = Synthesis(o, self.spec, self.dtype)

    def __call__(self, z: Array, label: Array | None, keys: Array | None) -> Array:
        """f32[n,latent], i32[n] or None, key[n] or None -> f32[n,H,W,C]."""
        return self.synthesis(self.mapping(z, label), keys)

    def mapping(self, z: Array, label: Array | None) -> Array:
        """f32[n,latent], i32[n] or None -> w f32[n,style]."""
        return self.mapping_network(z, label)

    def synthesis(self, w: Array, keys: Array | None) -> Array:
        """w f32[n,style], key[n] or None -> f32[n,H,W,C], about in [-1, 1]. Without keys no noise is added."""
        return self.synthesis_network(w, keys)


class Mapping(nn.Module):
    """z and an embedding of the label, each brought to mean square 1, through dense layers; in float32."""

    features: int
    depth: int
    num_classes: int

    @nn.compact
    def __call__(self, z: Array | None, label: Array | None) -> Array:
        """f32[n,latent] or None, i32[n] or None -> f32[n,features]."""
        parts = [] if z is None else [z]
        if self.num_classes:
            parts.append(Dense(self.features, name="label")(jax.nn.one_hot(label, self.num_classes)))
        x = jnp.concatenate([layers.rms(part, (1,), EPSILON) for part in parts], axis=-1)
        for i in range(self.depth):
            x = activated(Dense(self.features, MAPPING_RATE, name=f"dense_{i}")(x))
        return x


class Synthesis(nn.Module):
    """A learned constant at 4x4, then two convolutions a resolution, each of which adds its share to the image."""

    options: GeneratorOptions
    spec: ImageSpec
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, w: Array, keys: Array | None) -> Array:
        """w f32[n,style], key[n] or None -> f32[n,H,W,C]."""
        o, layer = self.options, itertools.count()

        def styled(x: Array, name: str, double: bool = False) -> Array:
            features = channels(o, 2 * x.shape[1] if double else x.shape[1])
            return StyledConv(features, double, next(layer), self.dtype, name=name)(x, w, keys)

        constant = self.param("constant", nn.initializers.normal(1.0), (4, 4, channels(o, 4)))
        x = jnp.broadcast_to(constant.astype(self.dtype), (len(w), *constant.shape))
        x = styled(x, "conv_4")
        image = ToRGB(self.spec.channels, name="image_4")(x, w)
        while x.shape[1] < self.spec.size:
            side = 2 * x.shape[1]
            x = styled(x, f"double_{side}", double=True)
            x = styled(x, f"conv_{side}")
            image = doubled(image, TAPS) + ToRGB(self.spec.channels, name=f"image_{side}")(x, w)
        return image


class StyledConv(nn.Module):
    """x <- sqrt(2) lrelu(w'' * x + strength noise + b), with the noise of a pixel the same for all its channels."""

    features: int
    double: bool
    layer: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, w: Array, keys: Array | None) -> Array:
        """[n,H,W,C], f32[n,style], key[n] or None -> [n,H,W,features], or twice as high and wide."""
        strength = self.param("strength", layers.ZEROS, ())
        bias = self.param("bias", layers.ZEROS, (self.features,))
        y = ModulatedConv(self.features, double=self.double, dtype=self.dtype, name="conv")(x, w)
        if keys is not None:
            y = y + strength * rng.normal(rng.fold(keys, self.layer), (*y.shape[1:3], 1))
        return activated(y + layers.spread(bias[None], y.shape)).astype(self.dtype)


class ToRGB(nn.Module):
    """A 1x1 convolution to the image's channels, modulated and not demodulated, in float32."""

    features: int

    @nn.compact
    def __call__(self, x: Array, w: Array) -> Array:
        """[n,H,W,C], f32[n,style] -> f32[n,H,W,features]."""
        bias = self.param("bias", layers.ZEROS, (self.features,))
        y = ModulatedConv(self.features, size=1, demodulate=False, name="conv")(x, w)
        return y + layers.spread(bias[None], y.shape)


class ModulatedConv(nn.Module):
    """Convolution with a kernel of each example's own, w''_ijk: section 2.2, i inputs, j outputs, k pixels.

    A convolution is linear in its kernel, so that the style may scale x instead, and the root may divide y:

        y_j = sum_ik w''_ijk * x_i = (sum_ik w_ijk * (s_i x_i)) / sqrt(sum_i s_i^2 sum_k w_ijk^2 + 1e-8)

    One kernel serves the whole batch then. The other way, n kernels in one grouped convolution, reads n times the
    weights and is what CPUs and TPUs are slow at.
    """

    features: int
    size: int = 3
    double: bool = False
    demodulate: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, w: Array) -> Array:
        """[n,H,W,C], f32[n,style] -> f32[n,H,W,features], or f32[n,2H,2W,features] where `double`."""
        C = x.shape[-1]
        kernel = equalised(self, (self.size, self.size, C, self.features))
        style = Dense(C, begin=1.0, name="style")(w)
        convolution = doubling_convolution if self.double else convolve
        y = convolution(scaled(x, style).astype(self.dtype), kernel.astype(self.dtype)).astype(jnp.float32)
        if self.demodulate:
            squares = jnp.square(style) @ jnp.sum(jnp.square(kernel), (0, 1))
            y = scaled(y, jax.lax.rsqrt(squares + EPSILON))
        return y


# ---------------------------------------------------------------------------------------------- discriminator


class Discriminator(nn.Module):
    """From RGB, a residual block a resolution, the minibatch standard deviation, two dense layers.

    With classes the last layer is as wide as the embedding of a label, and the logit is their product over the root of
    their width: projection (Miyato & Koyama 2018) as NVlabs/stylegan2-ada-pytorch has it.
    """

    options: DiscriminatorOptions
    spec: ImageSpec
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, label: Array | None) -> Array:
        """f32[n,H,W,C], i32[n] or None -> f32[n]; example i depends on the others of its group, too."""
        o, C = self.options, channels(self.options, 4)
        x = Layer(channels(o, self.spec.size), size=1, dtype=self.dtype, name="image")(x)
        while x.shape[1] > 4:
            x = ResidualBlock(channels(o, x.shape[1] // 2), self.dtype, name=f"block_{x.shape[1]}")(x)
        x = with_deviation(x.astype(jnp.float32), o.group)
        x = Layer(C, name="conv_4")(x)
        x = activated(Dense(C, name="dense")(x.reshape(len(x), -1)))
        if not self.spec.num_classes:
            return Dense(1, name="logit")(x)[:, 0]
        embedding = Mapping(C, o.mapping_layers, self.spec.num_classes, name="mapping")(None, label)
        return jnp.sum(Dense(C, name="logit")(x) * embedding, axis=-1) / math.sqrt(C)


class ResidualBlock(nn.Module):
    """Two convolutions and a 1x1 convolution beside them; both ways halve the image."""

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[n,H,W,C] -> [n,H/2,W/2,features]."""
        y = Layer(x.shape[-1], dtype=self.dtype, name="conv")(x)
        y = Layer(self.features, halve=True, dtype=self.dtype, name="halve")(y)
        kernel = equalised(self, (1, 1, x.shape[-1], self.features)).astype(self.dtype)
        return (convolve(halved(x, TAPS), kernel) + y) / SQRT_2


class Layer(nn.Module):
    """sqrt(2) lrelu(w * x + b), where `halve` of x at half its resolution."""

    features: int
    size: int = 3
    halve: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[n,H,W,C] -> [n,H,W,features], or half as high and wide."""
        kernel = equalised(self, (self.size, self.size, x.shape[-1], self.features)).astype(self.dtype)
        bias = self.param("bias", layers.ZEROS, (self.features,))
        convolution = halving_convolution if self.halve else convolve
        y = convolution(x.astype(self.dtype), kernel).astype(jnp.float32)
        return activated(y + layers.spread(bias[None], y.shape)).astype(self.dtype)


def with_deviation(x: Array, group: int) -> Array:
    """x and, as one channel more, the standard deviation within groups of the batch (Karras et al. 2018, section 3).

    A number a group: the mean over pixels and channels. Of n examples in groups of g, example i shares its group with
    i + n/g, i + 2n/g, ... So do the examples of a microbatch, which are every m-th of the batch: accumulation changes
    nothing as long as g divides the microbatch. Devices change nothing in any case: the compiler sees the whole batch.

    Args:
      x: f32[n,H,W,C].
      group: g is the largest divisor of n up to it.

    Returns:
      f32[n,H,W,C+1].
    """
    n = len(x)
    g = max(divisor for divisor in range(1, group + 1) if n % divisor == 0)
    groups = x.reshape(g, n // g, *x.shape[1:])
    variance = jnp.mean(jnp.square(groups - jnp.mean(groups, 0, keepdims=True)), 0)
    deviation = jnp.mean(jnp.sqrt(variance + EPSILON), (1, 2, 3))
    channel = jnp.broadcast_to(jnp.tile(deviation, g)[:, None, None, None], (*x.shape[:-1], 1))
    return jnp.concatenate([x, channel], axis=-1)


# ---------------------------------------------------------------------------------------------- layers


class Dense(nn.Module):
    """y = rate (x W / sqrt(C) + b), W beginning as N(0, 1 / rate^2), in float32.

    `begin` is what y is for x = 0 at the beginning.
    """

    features: int
    rate: float = 1.0
    begin: float = 0.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """f32[n,C] -> f32[n,features]."""
        kernel = equalised(self, (x.shape[-1], self.features), self.rate)
        bias = self.param("bias", nn.initializers.constant(self.begin / self.rate), (self.features,))
        return x @ kernel + self.rate * bias[None]


def equalised(module: nn.Module, shape: tuple[int, ...], rate: float = 1.0) -> Array:
    """The parameter `kernel` of `module`, N(0, 1 / rate^2) at the beginning, times rate / sqrt(inputs)."""
    kernel = module.param("kernel", nn.initializers.normal(1.0 / rate), shape)
    return rate / math.sqrt(math.prod(shape[:-1])) * kernel


def activated(x: Array) -> Array:
    """sqrt(2) lrelu(x), with slope 0.2 below 0."""
    return SQRT_2 * nn.leaky_relu(x, 0.2)


def scaled(x: Array, scale: Array) -> Array:
    """x [n,H,W,C] times scale f32[n,C], in float32."""
    return x.astype(jnp.float32) * layers.spread(scale, x.shape)


def doubling_convolution(x: Array, kernel: Array) -> Array:
    """x doubled by the filter, then convolved: [n,H,W,C], [3,3,C,D] -> [n,2H,2W,D].

    In the other order, which is the same: x with zeros between its pixels is convolved, then filtered, and of the
    products three quarters are with zeros and can be left out.
    """
    return 4.0 * blurred(spaced_convolution(x, kernel), padding=1)  # of four numbers in x's place three are zeros


def spaced_convolution(x: Array, kernel: Array) -> Array:
    """x with zeros between its pixels, convolved as far as the kernel reaches: [n,H,W,C] -> [n,2H+1,2W+1,D].

    An even row of the output meets rows 0 and 2 of the kernel, an odd one row 1; so do columns. Hence four small
    convolutions, whose outputs are interleaved.
    """
    n, H, W, _ = x.shape
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))

    def part(row: int, column: int) -> Array:
        """[n,H+1,W+1,D]: the outputs in even (0) or odd (1) rows and columns."""
        return convolve(x[:, row:, column:], kernel[row::2, column::2], padding=0)

    rows = [jnp.stack([part(row, column) for column in (0, 1)], axis=3) for row in (0, 1)]
    return jnp.stack(rows, axis=2).reshape(n, 2 * H + 2, 2 * W + 2, -1)[:, :-1, :-1]


def halving_convolution(x: Array, kernel: Array) -> Array:
    """x filtered, then convolved at every second pixel: [n,H,W,C], [3,3,C,D] -> [n,H/2,W/2,D]."""
    return convolve(blurred(x, padding=2), kernel, stride=2, padding=0)


def blurred(x: Array, padding: int) -> Array:
    """x filtered with `padding` zeros around it: [n,H,W,C] -> [n,H+2p-3,W+2p-3,C]."""
    return filtered(x, TAPS, padding=padding)
