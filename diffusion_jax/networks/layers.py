"""Layers that the networks share.

Parameters are float32 and arithmetic is in `dtype`. Biases, affines and the statistics of norms are float32 whatever
`dtype` is: summed over a batch in bfloat16, a bias's gradient loses most of its digits.
"""

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_jax import rng
from diffusion_jax.networks.convolution import convolve
from diffusion_jax.types import Array

XAVIER = nn.initializers.xavier_uniform()
ZEROS = nn.initializers.zeros_init()
UNIFORM = nn.initializers.variance_scaling(1.0 / 3.0, "fan_in", "uniform")
"""Between -1 / sqrt(n) and 1 / sqrt(n) for n inputs, torch's default; torch's biases begin so, too, and ours at 0."""


def ready(module: nn.Module, name: str, make: Callable[[], Array]) -> Array:
    """The weight `make()`, as `module` uses it: taken from where `Network.prepare` left it, or made here."""
    if module.has_variable("ready", name):
        return module.get_variable("ready", name)
    weight = make()
    if module.is_mutable_collection("ready") and not module.is_initializing():
        module.put_variable("ready", name, weight)
    return weight


class Dense(nn.Module):
    """y = x W + b over the last axis, with b added in float32, or without b.

    The leading axes are folded into one: XLA's CPU compiler makes the gradient of a three-axis product twice as slow.
    """

    features: int
    dtype: jnp.dtype = jnp.float32
    kernel_init: nn.initializers.Initializer = XAVIER
    bias: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[..., C] -> [..., features]."""
        shape = (x.shape[-1], self.features)
        kernel = ready(self, "kernel", lambda: self.param("kernel", self.kernel_init, shape).astype(self.dtype))
        y = x.astype(self.dtype).reshape(-1, x.shape[-1]) @ kernel
        if self.bias:
            y = _add_bias(y, self.param("bias", ZEROS, (self.features,)), self.dtype)
        return y.reshape(*x.shape[:-1], self.features)


class Conv(nn.Module):
    """Square convolution, NHWC, with the bias added in float32, or without one; `padding` as in `convolve`."""

    features: int
    size: int = 3
    stride: int = 1
    padding: int | None = None
    dtype: jnp.dtype = jnp.float32
    kernel_init: nn.initializers.Initializer = XAVIER
    bias: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B,H,W,C] -> [B,H/stride,W/stride,features]."""
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = ready(self, "kernel", lambda: self.param("kernel", self.kernel_init, shape).astype(self.dtype))
        y = convolve(x.astype(self.dtype), kernel, self.stride, self.padding)
        return _add_bias(y, self.param("bias", ZEROS, (self.features,)), self.dtype) if self.bias else y


def _add_bias(y: Array, bias: Array, dtype: jnp.dtype) -> Array:
    return (y.astype(jnp.float32) + spread(bias[None], y.shape)).astype(dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def spread(vectors: Array, shape: tuple[int, ...]) -> Array:
    """Vectors [B or 1, C], each over the rows of its example: an array of `shape`, (B, ..., C).

    On CPUs the derivative is written as a product with ones, 1 v^T. So its transpose, the sum over rows that is the
    gradient of a bias or an affine, is a product too. Of a sum XLA's CPU compiler makes one loop with all that is
    computed before it, and half of a U-Net's training step goes into those loops (docs/performance.md).
    """
    return jnp.broadcast_to(vectors.reshape(-1, *(1,) * (len(shape) - 2), shape[-1]), shape)


@spread.defjvp
def _spread_derivative(shape: tuple[int, ...], primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (vectors,), (tangent,) = primals, tangents
    if jax.default_backend() != "cpu":
        return spread(vectors, shape), spread(tangent, shape)
    rows = math.prod(shape[:-1]) // len(tangent)
    ones = jnp.ones((len(tangent), rows, 1), tangent.dtype)
    product = jnp.matmul(ones, tangent[:, None], precision=jax.lax.Precision.HIGHEST)
    return spread(vectors, shape), product.reshape(shape)


class GroupNorm(nn.Module):
    """Group normalisation with scale and bias (Wu & He 2018), statistics and affine in float32.

    At least 4 channels a group, as in NVlabs/edm: a norm of single channels would take away a condition added to them.
    """

    groups: int = 32
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B,H,W,C] -> the same, in x's dtype."""
        B, C = len(x), x.shape[-1]
        scale = self.param("scale", nn.initializers.ones_init(), (C,))
        bias = self.param("bias", ZEROS, (C,))
        groups = min(self.groups, C // 4)

        def mean(x: Array) -> Array:
            """[B,C]: the mean over pixels and a group's channels, once for each channel of the group."""
            of_groups = jnp.mean(jnp.mean(x, tuple(range(1, x.ndim - 1))).reshape(B, groups, -1), -1)
            return jnp.repeat(of_groups, C // groups, axis=-1)

        y = x.astype(jnp.float32)
        y = y - spread(mean(y), y.shape)
        scale = scale[None] * jax.lax.rsqrt(mean(jnp.square(y)) + self.epsilon)
        return (y * spread(scale, y.shape) + spread(bias[None], y.shape)).astype(x.dtype)


def standardise(x: Array, axes: tuple[int, ...], epsilon: float) -> Array:
    """(x - mean) / sqrt(variance + epsilon) over `axes`."""
    mean = jnp.mean(x, axes, keepdims=True)
    variance = jnp.mean(jnp.square(x - mean), axes, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(variance + epsilon)


def rms(x: Array, axes: tuple[int, ...], epsilon: float) -> Array:
    """X / sqrt(mean of x^2 + epsilon) over `axes`."""
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axes, keepdims=True) + epsilon)


def dropout(x: Array, rate: float, keys: Array | None, layer: int) -> Array:
    """Zero entries with probability `rate` and scale the rest by 1 / (1 - rate).

    Args:
      x: [B, ...].
      rate: in [0, 1).
      keys: key[B], one an example, or None: then nothing is dropped.
      layer: the number of the layer, so that two layers drop independently.
    """
    if keys is None or rate == 0.0:
        return x
    keep = rng.draw(rng.fold(keys, layer), lambda key: jax.random.bernoulli(key, 1.0 - rate, x.shape[1:]))
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))


def sinusoidal(t: Array, features: int, max_period: float = 10_000.0) -> Array:
    """Cosines, then sines, of t at `features` / 2 geometric frequencies from 1 to 1 / max_period.

    [n] -> [n, features] (Vaswani et al. 2017, section 3.5; with the halves side by side, as in ADM and DiT).
    """
    half = features // 2
    frequencies = jnp.exp(-jnp.log(max_period) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = t.astype(jnp.float32)[:, None] * frequencies[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
