"""DiT: a transformer over patches, conditioned through adaLN-Zero (Peebles & Xie 2022, section 3)."""

from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp

from diffusion_jax.networks import layers
from diffusion_jax.networks.layers import Dense
from diffusion_jax.types import Array

NORMAL = nn.initializers.normal(0.02)


@dataclass(frozen=True, kw_only=True)
class DiTOptions:
    """Sizes of a DiT.

    Attributes:
      patch: side of a patch in pixels; divides the image size.
      width: of the residual stream; divisible by 4 and by `heads`.
      depth: number of blocks.
      heads: of each attention.
      mlp_ratio: width of the hidden layer over `width`.
      dropout: probability in the attention's and the MLP's outputs.
    """

    patch: int = 2
    width: int = 384
    depth: int = 12
    heads: int = 6
    mlp_ratio: float = 4.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if min(self.patch, self.width, self.depth, self.heads, int(self.mlp_ratio * self.width)) < 1:
            raise ValueError("patch, width, depth, heads and mlp_ratio * width must be at least 1")
        if self.width % 4 or self.width % self.heads:
            raise ValueError(f"width must be divisible by 4 and by heads = {self.heads}, and {self.width} is not")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must lie in [0, 1), not {self.dropout}")


class DiT(nn.Module):
    """Patches -> blocks -> patches. The embedding of the positions is fixed, and no parameter."""

    options: DiTOptions
    channels_out: int
    num_classes: int  # 0: no label; the label `num_classes` itself stands for "none"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, time: Array, label: Array | None, keys: Array | None) -> Array:
        """See `networks.Network.apply`."""
        o = self.options
        B, H, W, C = x.shape
        h, w = H // o.patch, W // o.patch

        tokens = x.reshape(B, h, o.patch, w, o.patch, C).transpose(0, 1, 3, 2, 4, 5).reshape(B, h * w, -1)
        tokens = Dense(o.width, self.dtype, name="patch_in")(tokens)
        tokens = tokens + positions_2d(h, w, o.width).astype(self.dtype)[None]

        condition = TimeEmbedding(o.width, self.dtype, name="time")(time)
        if self.num_classes:
            table = self.param("label", NORMAL, (self.num_classes + 1, o.width))
            condition = condition + table[label].astype(self.dtype)
        condition = nn.silu(condition)

        for i in range(o.depth):
            tokens = Block(o, self.dtype, layer=2 * i, name=f"block_{i}")(tokens, condition, keys)

        shift, scale = modulation(2, condition, o.width, self.dtype, name="out_modulation")
        tokens = modulate(layers.layer_norm(tokens), shift, scale)
        tokens = Dense(o.patch**2 * self.channels_out, jnp.float32, layers.ZEROS, name="patch_out")(tokens)
        return tokens.reshape(B, h, w, o.patch, o.patch, -1).transpose(0, 1, 3, 2, 4, 5).reshape(B, H, W, -1)


class Block(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the condition; the gates start at zero."""

    options: DiTOptions
    dtype: jnp.dtype
    layer: int

    @nn.compact
    def __call__(self, x: Array, condition: Array, keys: Array | None) -> Array:
        """[B,T,width], [B or 1,width] -> [B,T,width]."""
        o = self.options
        B, T, width = x.shape
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation(
            6, condition, width, self.dtype, name="modulation"
        )

        y = modulate(layers.layer_norm(x), shift_a, scale_a)
        q, k, v = jnp.moveaxis(Dense(3 * width, self.dtype, name="qkv")(y).reshape(B, T, 3, o.heads, -1), 2, 0)
        y = Dense(width, self.dtype, name="attention_out")(layers.attention(q, k, v).reshape(B, T, width))
        x = x + gate_a * layers.dropout(y, o.dropout, keys, self.layer)

        y = modulate(layers.layer_norm(x), shift_m, scale_m)
        y = nn.gelu(Dense(int(o.mlp_ratio * width), self.dtype, name="mlp_in")(y), approximate=True)
        y = Dense(width, self.dtype, name="mlp_out")(y)
        return x + gate_m * layers.dropout(y, o.dropout, keys, self.layer + 1)


class TimeEmbedding(nn.Module):
    """Sinusoids of 1000 t, then a two-layer MLP."""

    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, time: Array) -> Array:
        """[n] -> [n, width]."""
        y = layers.sinusoidal(1000.0 * time, 256).astype(self.dtype)
        y = nn.silu(Dense(self.width, self.dtype, NORMAL, name="in")(y))
        return Dense(self.width, self.dtype, NORMAL, name="out")(y)


def modulation(count: int, condition: Array, width: int, dtype: jnp.dtype, name: str) -> list[Array]:
    """`count` vectors [n, 1, width] from the condition, all zero at initialisation (adaLN-Zero)."""
    vectors = Dense(count * width, dtype, layers.ZEROS, name=name)(condition)
    return jnp.split(vectors[:, None], count, axis=-1)


def modulate(x: Array, shift: Array, scale: Array) -> Array:
    """X (1 + scale) + shift."""
    return x * (1.0 + scale) + shift


def positions_2d(height: int, width: int, features: int) -> Array:
    """Fixed sinusoidal positions [height * width, features]: half of the features for the column, half for the row."""

    def axis(positions: Array) -> Array:
        embedded = layers.sinusoidal(positions, features // 2)
        cosine, sine = jnp.split(embedded, 2, axis=-1)
        return jnp.concatenate([sine, cosine], axis=-1)  # the order of the published weights

    rows, columns = jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij")
    return jnp.concatenate([axis(columns.reshape(-1)), axis(rows.reshape(-1))], axis=-1)


def patch_error(options: DiTOptions, size: int) -> str:
    """Why images of `size` pixels cannot be cut into patches, or ""."""
    return "" if size % options.patch == 0 else f"patch = {options.patch} must divide the image size {size}"
