"""Layers that the networks share.

Parameters are float32 and arithmetic is in `dtype`. Biases, affines and the statistics of norms are float32 whatever
`dtype` is: summed over a batch in bfloat16, a bias's gradient loses most of its digits.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_jax import rng
from diffusion_jax.types import Array

XAVIER = nn.initializers.xavier_uniform()
ZEROS = nn.initializers.zeros_init()


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
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        y = x.astype(self.dtype).reshape(-1, x.shape[-1]) @ kernel.astype(self.dtype)
        if self.bias:
            y = _add_bias(y, self.param("bias", ZEROS, (self.features,)), self.dtype)
        return y.reshape(*x.shape[:-1], self.features)


class Conv(nn.Module):
    """Square convolution with "same" padding, NHWC, with the bias added in float32."""

    features: int
    size: int = 3
    stride: int = 1
    dtype: jnp.dtype = jnp.float32
    kernel_init: nn.initializers.Initializer = XAVIER

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B,H,W,C] -> [B,H/stride,W/stride,features]."""
        kernel = self.param("kernel", self.kernel_init, (self.size, self.size, x.shape[-1], self.features))
        bias = self.param("bias", ZEROS, (self.features,))
        y = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            window_strides=(self.stride, self.stride),
            padding="SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return _add_bias(y, bias, self.dtype)


def _add_bias(y: Array, bias: Array, dtype: jnp.dtype) -> Array:
    bias = bias.reshape((1,) * (y.ndim - 1) + bias.shape)
    return (y.astype(jnp.float32) + bias).astype(dtype)


class GroupNorm(nn.Module):
    """Group normalisation with scale and bias (Wu & He 2018), statistics and affine in float32.

    At least 4 channels a group, as in NVlabs/edm: a norm of single channels would take away a condition added to them.
    """

    groups: int = 32
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B,H,W,C] -> the same, in x's dtype."""
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones_init(), (channels,))
        bias = self.param("bias", ZEROS, (channels,))
        count = min(self.groups, channels // 4)
        groups = x.astype(jnp.float32).reshape(*x.shape[:-1], count, channels // count)
        y = standardise(groups, axes=(1, 2, 4), epsilon=self.epsilon).reshape(x.shape)
        ones = (1,) * (x.ndim - 1)
        return (y * scale.reshape(*ones, channels) + bias.reshape(*ones, channels)).astype(x.dtype)


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
