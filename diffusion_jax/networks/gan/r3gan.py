"""R3GAN (Huang et al. 2024, "The GAN is dead; long live the GAN!", sections 3.4 and 3.5: their configuration E).

    G: z -> basis of 4x4 -> L/n blocks -> [1x1, doubled -> L/n blocks] ... -> 1x1 to the image
    D: 1x1 from the image -> L/n blocks -> [halved, 1x1 -> L/n blocks] ... -> basis of 4x4 -> logit
    block: x <- x + W3 a(W2 a(W1 x))        W1 and W3 1x1, W2 3x3 in groups, a(x) = lrelu(x + b)

over n resolutions with L blocks in all; 1x1 convolutions between them only where the width changes. There is no norm.
Instead each block begins as the identity, and the sum of L blocks moves by about as much as one would (Fix-up, Zhang et
al. 2019): W3 begins at 0, W1 and W2 with He et al.'s variance times L^(-1/2), the exponent being -1 / (m - 1) for the
m = 3 layers of a branch. All other biases are left out. Halving and doubling are bilinear, the filter (1, 3, 3, 1).
"""

import math
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_jax.networks import layers
from diffusion_jax.networks.convolution import convolve
from diffusion_jax.networks.ddpmpp import doubled, halved
from diffusion_jax.networks.gan import stylegan2
from diffusion_jax.networks.gan.stylegan2 import TAPS, channels, check_positive
from diffusion_jax.types import Array, ImageSpec

SLOPE = 0.2
GAIN = math.sqrt(2.0 / (1.0 + SLOPE**2))
"""What keeps the variance through a leaky ReLU (He et al. 2015, eq. 15)."""


@dataclass(frozen=True, kw_only=True)
class DiscriminatorOptions:
    """Sizes. At 256 pixels the defaults have 23,009,568 parameters: FFHQ-256 of the paper.

    Attributes:
      channels_base: channels at a resolution times its side in pixels, as far as `channels_max` lets them.
      channels_max: the most channels at a resolution.
      blocks: a resolution.
      expansion: width inside a block over the width outside.
      group: channels in each group of the 3x3 convolutions; it divides the width inside every block.
    """

    channels_base: int = 24576
    channels_max: int = 768
    blocks: int = 2
    expansion: int = 2
    group: int = 16

    def __post_init__(self) -> None:
        check_positive(self)


@dataclass(frozen=True, kw_only=True)
class GeneratorOptions(DiscriminatorOptions):
    """The same of the generator, and its inputs. At 256 pixels the defaults have 23,057,952 parameters.

    Attributes:
      latent: numbers in z.
      embedding: numbers in a label's embedding; none without classes.
    """

    latent: int = 64
    embedding: int = 64


def size_error(options: DiscriminatorOptions, size: int) -> str:
    """Why there is no network for images of `size` pixels, or ""."""
    if problem := stylegan2.size_error(options, size):
        return problem
    for side in sides(size):
        inside = options.expansion * channels(options, side)
        if inside % options.group:
            return f"group must divide the {inside} channels inside the blocks at {side}x{side}"
    return ""


def sides(size: int) -> list[int]:
    """The resolutions 4, 8, ..., `size`."""
    return [2**power for power in range(2, size.bit_length())]


class Generator(nn.Module):
    """z to an image, through ever larger grids."""

    options: GeneratorOptions
    spec: ImageSpec
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, z: Array, label: Array | None, keys: Array | None) -> Array:
        """f32[n,latent], i32[n] or None -> f32[n,H,W,C]. Nothing is drawn: `keys` are not looked at."""
        o = self.options
        if self.spec.num_classes:
            embedding = Linear(o.embedding, name="label")(jax.nn.one_hot(label, self.spec.num_classes))
            z = jnp.concatenate([z, embedding], axis=-1)
        basis = self.param("basis", nn.initializers.normal(1.0), (4, 4, channels(o, 4)))
        x = (basis[None] * Linear(channels(o, 4), name="in")(z)[:, None, None]).astype(self.dtype)
        for side in sides(self.spec.size):
            if side > 4:
                x = doubled(widened(x, channels(o, side), self.dtype, f"widen_{side}"), TAPS)
            x = blocks(x, o, self.spec.size, self.dtype)
        return Conv(self.spec.channels, name="out")(x.astype(jnp.float32))


class Discriminator(nn.Module):
    """An image to a logit, through ever smaller grids.

    With classes the logit is the product of what else would be it, a vector then, and the label's embedding.
    """

    options: DiscriminatorOptions
    spec: ImageSpec
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, label: Array | None) -> Array:
        """f32[n,H,W,C], i32[n] or None -> f32[n]."""
        o, C = self.options, channels(self.options, 4)
        x = Conv(channels(o, self.spec.size), dtype=self.dtype, name="in")(x)
        for side in reversed(sides(self.spec.size)):
            x = blocks(x, o, self.spec.size, self.dtype)
            if side > 4:
                x = widened(halved(x, TAPS), channels(o, side // 2), self.dtype, f"widen_{side // 2}")
        basis = self.param("basis", nn.initializers.normal(1.0 / 4.0), (4, 4, C))  # of each channel 16 numbers
        x = jnp.sum(basis[None] * x.astype(jnp.float32), (1, 2))
        if not self.spec.num_classes:
            return Linear(1, name="logit")(x)[:, 0]
        embedding = Linear(C, 1.0 / math.sqrt(C), name="label")(jax.nn.one_hot(label, self.spec.num_classes))
        return jnp.sum(Linear(C, name="logit")(x) * embedding, axis=-1)


def blocks(x: Array, options: DiscriminatorOptions, size: int, dtype: jnp.dtype) -> Array:
    """The blocks at one resolution of a network for images of `size` pixels."""
    total = options.blocks * len(sides(size))
    for i in range(options.blocks):
        x = Block(options.expansion, options.group, total, dtype, name=f"block_{x.shape[1]}_{i}")(x)
    return x


def widened(x: Array, features: int, dtype: jnp.dtype, name: str) -> Array:
    """x, through a 1x1 convolution where it has not `features` channels."""
    return x if x.shape[-1] == features else Conv(features, dtype=dtype, name=name)(x)


class Block(nn.Module):
    """x <- x + W3 a(W2 a(W1 x)), one of `total`."""

    expansion: int
    group: int
    total: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[n,H,W,C] -> the same."""
        inside, gain = self.expansion * x.shape[-1], GAIN * self.total**-0.25
        y = Conv(inside, gain=gain, dtype=self.dtype, name="conv_0")(x)
        y = BiasedActivation(name="bias_0")(y)
        y = Conv(inside, size=3, groups=inside // self.group, gain=gain, dtype=self.dtype, name="conv_1")(y)
        y = BiasedActivation(name="bias_1")(y)
        return x + Conv(x.shape[-1], gain=0.0, dtype=self.dtype, name="conv_2")(y)


class BiasedActivation(nn.Module):
    """a(x) = lrelu(x + b), in float32."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[n,H,W,C] -> the same."""
        bias = self.param("bias", layers.ZEROS, (x.shape[-1],))
        return nn.leaky_relu(x.astype(jnp.float32) + layers.spread(bias[None], x.shape), SLOPE).astype(x.dtype)


class Conv(nn.Module):
    """Convolution without bias, zeros outside, whose output begins with `gain`^2 times the input's variance."""

    features: int
    size: int = 1
    groups: int = 1
    gain: float = 1.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[n,H,W,C] -> [n,H,W,features]."""
        shape = (self.size, self.size, x.shape[-1] // self.groups, self.features)
        kernel = self.param("kernel", of_gain(self.gain), shape).astype(self.dtype)
        x = x.astype(self.dtype)
        if self.groups == 1:
            return convolve(x, kernel)
        return (grouped_products if jax.default_backend() == "cpu" else grouped_convolution)(x, kernel, self.groups)


def grouped_convolution(x: Array, kernel: Array, groups: int) -> Array:
    """[n,H,W,C], [k,k,C/groups,D] -> [n,H,W,D], zeros outside."""
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def grouped_products(x: Array, kernel: Array, groups: int) -> Array:
    """The same as one matrix product a group, of k x k shifted images.

    XLA's CPU compiler makes a plain loop of a grouped convolution and of its derivatives, which takes many times as
    long.
    """
    (n, H, W, C), k = x.shape, len(kernel)
    x = jnp.moveaxis(x.reshape(n, H, W, groups, C // groups), 3, 0)
    x = jnp.pad(x, ((0, 0), (0, 0), (k // 2, k // 2), (k // 2, k // 2), (0, 0)))
    shifted = [x[:, :, i : i + H, j : j + W] for i in range(k) for j in range(k)]
    patches = jnp.concatenate(shifted, axis=-1).reshape(groups, n * H * W, k * k * C // groups)
    y = patches @ jnp.moveaxis(kernel.reshape(patches.shape[-1], groups, -1), 1, 0)
    return jnp.moveaxis(y.reshape(groups, n, H, W, -1), 0, 3).reshape(n, H, W, -1)


class Linear(nn.Module):
    """y = x W in float32, beginning as `Conv`."""

    features: int
    gain: float = 1.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """f32[n,C] -> f32[n,features]."""
        return x @ self.param("kernel", of_gain(self.gain), (x.shape[-1], self.features))


def of_gain(gain: float) -> nn.initializers.Initializer:
    """Normal with variance `gain`^2 / inputs."""
    if not gain:
        return layers.ZEROS
    return nn.initializers.variance_scaling(gain**2, "fan_in", "normal")
