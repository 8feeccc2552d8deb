"""EDM2's magnitude-preserving U-Net (Karras et al. 2024, configuration G, their figure 21; NVlabs/edm2).

Every layer keeps the mean square of what passes through it: where the input's is 1, so is the output's, whatever the
weights have become. Hence no norms with statistics of the whole image, and no biases, which a column of ones replaces.

    weights      w / |w|, one vector of length 1 an output                       (eq. 47)
    silu         silu(x) / 0.596                                                 (eq. 81)
    sum          ((1 - t) a + t b) / sqrt((1 - t)^2 + t^2)                       (eq. 88)
    concat       C [ (1 - t) / sqrt(Na) a,  t / sqrt(Nb) b ]                     (eq. 103)
    time         sqrt(2) cos(2 pi (f time + phi))                                (eq. 75)

What must be able to grow has a gain, one number that begins at 0: the output's, and each block's for the condition.
"""

import itertools
import math
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.networks import attention, layers, remat
from diffusion_jax.networks.convolution import convolve
from diffusion_jax.networks.unet import check_multipliers, check_sizes, doubled
from diffusion_jax.types import Array, Tree

RESIDUAL, ATTENTION, LABEL, SKIP = 0.3, 0.3, 0.5, 0.5
"""The share t of the branch in a sum; of the label in the condition; of the encoder's half in a concatenation."""

LARGEST = 256.0
"""Activations are clipped to it, as published, for the sake of numbers of 16 bits."""


@dataclass(frozen=True, kw_only=True)
class EDM2Options:
    """Sizes of an EDM2 U-Net. The defaults are EDM2-S: 280,212,837 parameters with 1000 classes on 64x64x4 latents.

    Attributes:
      channels: at the first resolution; a multiple of 32 and of `head_channels`.
      multipliers: of `channels` at each resolution; every further one halves the image's side.
      blocks: a resolution on the way down; one more on the way up.
      attention: sides, in pixels, at which the blocks end in attention.
      head_channels: of each attention's heads.
      dropout: probability inside the blocks.
      log_variance: number of Fourier features of the head that learns the loss's size; 0 for no head.
      remat: from `remat.POLICIES`, what the backward pass keeps of each block.
      attention_implementation: from `attention.IMPLEMENTATIONS`, or "auto".
    """

    channels: int = 192
    multipliers: tuple = (1, 2, 3, 4)
    blocks: int = 3
    attention: tuple = (16, 8)
    head_channels: int = 64
    dropout: float = 0.0
    log_variance: int = 128
    remat: str = "none"
    attention_implementation: str = "auto"

    def __post_init__(self) -> None:
        check_sizes(self)
        if self.head_channels < 1 or self.channels % self.head_channels:
            raise ValueError(
                f"channels must be a multiple of head_channels = {self.head_channels}, not {self.channels}"
            )
        check_multipliers(self.multipliers)
        if self.log_variance < 0:
            raise ValueError(f"log_variance must be at least 0, not {self.log_variance}")


class EDM2(nn.Module):
    """Encoder, decoder, and between them skips; `log_variance` and `project` are functions of its parameters."""

    options: EDM2Options
    channels_out: int
    num_classes: int  # 0: no label; the label `num_classes` itself stands for "none"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, time: Array, label: Array | None, keys: Array | None) -> Array:
        """See `networks.Network.apply`."""
        o = self.options
        if o.log_variance:
            self.param("log_variance", on_sphere, (o.log_variance, 1))  # read by the function `log_variance`
        condition = self.condition(time, label)
        last, layer = len(o.multipliers) - 1, itertools.count()
        residual_block = remat.block(Block, o.remat)

        def apply(x: Array, multiplier: int, name: str, encoder: bool = False, attends: bool = False) -> Array:
            features = multiplier * o.channels
            heads = features // o.head_channels if attends else 0
            block = residual_block(o, features, heads, encoder, next(layer), self.dtype, name=name)
            return block(x, condition, keys)

        x = jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1)
        x = Conv(o.channels, self.dtype, name="in")(x)
        skips = [x]
        for level, multiplier in enumerate(o.multipliers):
            if level:
                x = apply(halved(x), o.multipliers[level - 1], f"down_{level}", encoder=True)
                skips.append(x)
            for i in range(o.blocks):
                attends = x.shape[1] in o.attention
                x = apply(x, multiplier, f"down_{level}_{i}", encoder=True, attends=attends)
                skips.append(x)

        x = apply(x, o.multipliers[last], "middle_0", attends=True)
        x = apply(x, o.multipliers[last], "middle_1")

        for level, multiplier in reversed(list(enumerate(o.multipliers))):
            if level < last:
                x = apply(doubled(x), o.multipliers[level + 1], f"up_{level}")
            for i in range(o.blocks + 1):
                attends = x.shape[1] in o.attention
                x = apply(mp_concat(x, skips.pop(), SKIP), multiplier, f"up_{level}_{i}", attends=attends)

        return self.param("gain", layers.ZEROS, ()) * Conv(self.channels_out, jnp.float32, name="out")(x)

    def condition(self, time: Array, label: Array | None) -> Array:
        """The embedding of time and label, f32[B or 1, D], past its nonlinearity; no label is a vector of zeros."""
        o = self.options
        width = max(o.multipliers) * o.channels
        y = Dense(width, name="time")(fourier(time, o.multipliers[0] * o.channels))
        if self.num_classes:
            make = lambda: normalised(self.param("label", on_sphere, (self.num_classes, width)), axis=0)
            table = layers.ready(self, "label", make)
            y = mp_sum(y, table.at[label].get(mode="fill", fill_value=0.0), LABEL)
        return mp_silu(y)

    @staticmethod
    def log_variance(params: Tree, time: Array) -> Array:
        """u(time) f32[B] for time f32[B]: the log of the loss that is to be expected there (eq. 21)."""
        kernel = params["log_variance"]
        return (fourier(time, kernel.shape[0]) @ unit(kernel))[:, 0]

    @staticmethod
    def project(params: Tree) -> Tree:
        """Every weight vector back on the sphere of radius sqrt(fan-in), to be done after each update (eq. 66).

        The function stays. Weights that no update can lengthen have a learning rate that does not decay by itself.
        """
        return jax.tree.map(lambda leaf: normalised(leaf, fan_in(leaf)) if leaf.ndim else leaf, params)


class Block(nn.Module):
    """x + conv(silu(conv(silu(x)) * (1 + gain * condition))), then attention, all of them preserving magnitude.

    In the encoder x becomes as wide as the output first, and each pixel's vector is brought to one length.
    """

    options: EDM2Options
    features: int
    heads: int  # 0: no attention
    encoder: bool
    layer: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, condition: Array, keys: Array | None) -> Array:
        """[B,H,W,C], f32[B or 1,D] -> [B,H,W,features]."""
        if self.encoder:
            x = normalised(self.widened(x), axis=-1)

        y = Conv(self.features, self.dtype, name="conv_0")(mp_silu(x))
        scale = 1.0 + self.param("gain", layers.ZEROS, ()) * Dense(self.features, name="condition")(condition)
        y = mp_silu(y.astype(jnp.float32) * scale[:, None, None]).astype(self.dtype)
        y = layers.dropout(y, self.options.dropout, keys, self.layer)
        y = Conv(self.features, self.dtype, name="conv_1")(y)

        if not self.encoder:
            x = self.widened(x)
        x = mp_sum(x, y, RESIDUAL)
        if self.heads:
            x = mp_sum(x, self.attended(x), ATTENTION)
        return jnp.clip(x, -LARGEST, LARGEST)

    def widened(self, x: Array) -> Array:
        """x, through a matrix where it has not as many channels as the output."""
        return x if x.shape[-1] == self.features else Dense(self.features, self.dtype, name="skip")(x)

    def attended(self, x: Array) -> Array:
        """Cosine attention: queries, keys and values are brought to the length sqrt(head channels) each."""
        B, H, W, C = x.shape
        y = Dense(3 * C, self.dtype, name="qkv")(x).reshape(B, H * W, self.heads, -1, 3)
        q, k, v = jnp.moveaxis(normalised(y, axis=-2), -1, 0)
        y = attention.attention(q, k, v, self.options.attention_implementation).reshape(B, H, W, C)
        return Dense(C, self.dtype, name="attention_out")(y)


# ---------------------------------------------------------------------------------------------- weights


class Dense(nn.Module):
    """y = x W over the last axis, each column of W of length 1 in use."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[..., C] -> [..., features]."""
        kernel = ready_unit(self, (x.shape[-1], self.features))
        y = x.astype(self.dtype).reshape(-1, x.shape[-1]) @ kernel
        return y.reshape(*x.shape[:-1], self.features)


class Conv(nn.Module):
    """3x3 convolution, padded with zeros, each output's weights of length 1 in use."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B,H,W,C] -> [B,H,W,features]."""
        kernel = ready_unit(self, (3, 3, x.shape[-1], self.features))
        return convolve(x.astype(self.dtype), kernel)


def ready_unit(layer: Dense | Conv, shape: tuple[int, ...]) -> Array:
    """The layer's kernel of `shape` as it is used."""
    return layers.ready(layer, "kernel", lambda: unit(layer.param("kernel", on_sphere, shape)).astype(layer.dtype))


def unit(kernel: Array) -> Array:
    """w / |w| for each output, the last axis (eq. 47): independent inputs of mean square 1 give outputs of it."""
    axis = fan_in(kernel)
    return normalised(kernel, axis) / math.sqrt(math.prod(kernel.shape[i] for i in axis))


def on_sphere(key: Array, shape: tuple[int, ...]) -> Array:
    """Weight vectors of any direction and of the length that `EDM2.project` keeps."""
    kernel = jax.random.normal(key, shape)
    return normalised(kernel, fan_in(kernel))


def fan_in(kernel: Array) -> tuple[int, ...]:
    """The axes of the inputs: all but the last."""
    return tuple(range(kernel.ndim - 1))


# ---------------------------------------------------------------------------------------------- magnitudes


def normalised(x: Array, axis: int | tuple[int, ...], epsilon: float = 1e-4) -> Array:
    """x / (root mean square over `axis` + epsilon), the mean in float32."""
    mean_square = jnp.mean(jnp.square(x.astype(jnp.float32)), axis, keepdims=True)
    return (x.astype(jnp.float32) / (jnp.sqrt(mean_square) + epsilon)).astype(x.dtype)


def mp_silu(x: Array) -> Array:
    """silu(x) / 0.596, the divisor being the root mean square of silu at a standard normal (eq. 81)."""
    return nn.silu(x) / 0.596


def mp_sum(a: Array, b: Array, t: float) -> Array:
    """(1 - t) a + t b, over what its root mean square is where a and b are independent (eq. 88)."""
    return ((1.0 - t) * a + t * b) / math.hypot(1.0 - t, t)


def mp_concat(a: Array, b: Array, t: float) -> Array:
    """a and b along the last axis, each with a magnitude that makes t its share whatever its width (eq. 103)."""
    Na, Nb = a.shape[-1], b.shape[-1]
    C = math.sqrt(Na + Nb) / math.hypot(1.0 - t, t)
    return jnp.concatenate([C / math.sqrt(Na) * (1.0 - t) * a, C / math.sqrt(Nb) * t * b], axis=-1)


def fourier(time: Array, features: int) -> Array:
    """sqrt(2) cos(2 pi (f time + phi)) with fixed f from a standard normal and phi uniform in [0, 1) (eq. 75).

    [n] -> f32[n, features]. The numbers are part of what a checkpoint means, so they come from the one generator that
    NumPy promises never to change.
    """
    generator = np.random.RandomState(0)
    f, phi = np.float32(generator.normal(size=(1, features))), np.float32(generator.uniform(size=(1, features)))
    return math.sqrt(2.0) * jnp.cos(2.0 * math.pi * (time.astype(jnp.float32)[:, None] * f + phi))


def halved(x: Array) -> Array:
    """Means of 2x2 pixels."""
    B, H, W, C = x.shape
    return jnp.mean(x.reshape(B, H // 2, 2, W // 2, 2, C), axis=(2, 4))
