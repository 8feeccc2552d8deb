"""The block that all transformers here are made of, and what they share around it.

    x <- x + gate * attention(norm(x))
    x <- x + cross-attention(norm(x), context)     where there is a context
    x <- x + gate * MLP(norm(x))

    norm(x) = normalise(x) (1 + scale) + shift

Shift, scale and gate come from a condition (adaptive norms: Perez et al. 2018; Peebles & Xie 2022, section 3.2).
Without one, shift and scale are the norm's own and there is no gate.

Papers differ besides in where the norms stand, in biases, and in who sees whom: attributes of `Block`, a mask, and a
cache of keys and values for sequences that are made token by token.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.networks import attention, layers, remat
from diffusion_jax.networks.layers import Dense
from diffusion_jax.types import Array

NORMAL = nn.initializers.normal(0.02)

# ---------------------------------------------------------------------------------------------- what a user sets


@dataclass(frozen=True, kw_only=True)
class BlockOptions:
    """Sizes and parts of a block.

    Attributes:
      width: of the residual stream; divisible by 4 and by `heads`.
      heads: of each attention.
      mlp_ratio: width of the MLP's hidden layer over `width`.
      mlp: a row of MLPS.
      multiple_of: the hidden layer's width is rounded up to a multiple of this.
      norm: a row of NORMS.
      epsilon: under the norms' root.
      qkv_bias: whether queries, keys and values have a bias.
      qk_norm: whether self-attention's queries and keys are RMS-normalised, head by head (Dehghani et al. 2023,
        section 2.1).
      dropout: probability in the outputs of attention and MLP.
      attention: a row of `attention.IMPLEMENTATIONS`, or "auto".
    """

    width: int = 384
    heads: int = 6
    mlp_ratio: float = 4.0
    mlp: str = "gelu"
    multiple_of: int = 1
    norm: str = "layer"
    epsilon: float = 1e-6
    qkv_bias: bool = True
    qk_norm: bool = False
    dropout: float = 0.0
    attention: str = "auto"

    def __post_init__(self) -> None:
        if not 0.0 < self.mlp_ratio < 1e6:
            raise ValueError(f"mlp_ratio must be positive and below 1e6, not {self.mlp_ratio}")
        if min(self.width, self.heads, self.multiple_of, int(2 * self.mlp_ratio * self.width / 3)) < 1:
            raise ValueError("width, heads, multiple_of and 2/3 mlp_ratio * width must be at least 1")
        if self.width % 4 or self.width % self.heads:
            raise ValueError(f"width must be divisible by 4 and by heads = {self.heads}, and {self.width} is not")
        for name, rows in (("mlp", MLPS), ("norm", NORMS)):
            if getattr(self, name) not in rows:
                raise ValueError(f"{name} must be one of {', '.join(rows)}, not {getattr(self, name)!r}")
        if not self.epsilon > 0.0:
            raise ValueError(f"epsilon must be positive, not {self.epsilon}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must lie in [0, 1), not {self.dropout}")
        attention.check(self.attention)


# ---------------------------------------------------------------------------------------------- the block


class Cache(NamedTuple):
    """What the tokens of a sequence that have been made so far are to those that come: keys and values, of all blocks.

    Attributes:
      pairs: [layers,2,B,T,heads,d], keys and values; zeros where there is no token yet.
      position: i32[], number of tokens that are there.
    """

    pairs: Array
    position: Array

    def extended(self, layer: Array | int, k: Array, v: Array) -> tuple["Cache", Array, Array]:
        """The cache with k, v [B,n,heads,d] of a block's n next tokens, and all of the block's keys and values.

        `position` stays, since the other blocks' are still to come.
        """
        new = jnp.stack([k, v])[None].astype(self.pairs.dtype)
        at = (layer, 0, 0, self.position, 0, 0)
        pairs = jax.lax.dynamic_update_slice(self.pairs, new, [jnp.asarray(i, jnp.int32) for i in at])
        return self._replace(pairs=pairs), *pairs[layer]


class Block(nn.Module):
    """Attention and MLP in residual branches.

    Attributes:
      vectors: how many a branch takes from the condition: 0; 2, shift and scale; 3, shift, scale and gate, which all
        start at zero, and with them the branch (adaLN-Zero).
      shared: whether the condition holds all branches' vectors, to which the block adds a table of its own
        (adaLN-single: Chen et al. 2023, section 2.3).
      post_norm: the norms stand behind the sums, x <- norm(x + branch(x)) (Vaswani et al. 2017, section 3.1); without
        `vectors`.
      bias: whether the outputs of attention and both layers of the MLP have one.
      key_bias: whether, among `qkv_bias`, keys have one; it would change no softmax.
      cosine: queries and keys are of unit length, times a learned temperature a head (Liu et al. 2022, section 3.3).
    """

    options: BlockOptions
    dtype: jnp.dtype
    vectors: int = 0
    shared: bool = False
    post_norm: bool = False
    bias: bool = True
    key_bias: bool = True
    cosine: bool = False

    @nn.compact
    def __call__(
        self,
        x: Array,
        layer: Array | int,
        keys: Array | None,
        condition: Array | None = None,
        context: Array | None = None,
        rotation: Array | None = None,
        mask: Array | None = None,
        cache: Cache | None = None,
    ) -> Array | tuple[Array, Cache]:
        """One block: x, and the longer cache where one is given.

        Args:
          x: [B,T,width].
          layer: the block's number, so that blocks drop independently.
          keys: of dropout, key[B] or None.
          condition: [B or 1, width], or [B or 1, 2 * vectors * width] where `shared`; None where `vectors` is 0.
          context: tokens [B or 1, S, width] for cross-attention, or None.
          rotation: cosines and sines [2, T, head width / 2] of the angles of queries and keys, or None.
          mask: bool [B or 1,T,S], the tokens that each token sees; all where None. S = T, or the cache's length.
          cache: of the tokens before x, or None.
        """
        o = self.options
        norm = lambda name: Norm(o.norm, o.epsilon, name=f"{name}_norm")
        before = lambda name, x, *vectors: x if self.post_norm else norm(name)(x, *vectors)
        after = lambda name, x: norm(name)(x) if self.post_norm else x
        drop = lambda y, branch: layers.dropout(y, o.dropout, keys, 3 * layer + branch)
        (shift, scale, gate), of_mlp = self.modulation(condition)

        y, cache = self.self_attention(before("attention", x, shift, scale), layer, rotation, mask, cache)
        x = after("attention", gated(x, gate, drop(y, 0)))
        if context is not None:
            x = after("cross", x + drop(self.cross_attention(before("cross", x), context), 1))
        shift, scale, gate = of_mlp
        y = MLPS[o.mlp](before("mlp", x, shift, scale), o, self.dtype, self.bias)
        x = after("mlp", gated(x, gate, drop(y, 2)))
        return x if cache is None else (x, cache)

    def modulation(self, condition: Array | None) -> list[tuple[Array | None, ...]]:
        """(shift, scale, gate) of attention and MLP, each [B or 1, 1, width] or None."""
        if not self.vectors:
            return [(None, None, None)] * 2
        shape = (2, self.vectors, self.options.width)
        if self.shared:
            vectors = condition.reshape(-1, *shape) + self.param("table", layers.ZEROS, shape)[None].astype(self.dtype)
        else:
            start = layers.ZEROS if self.vectors == 3 else layers.XAVIER
            vectors = Dense(shape[0] * shape[1] * shape[2], self.dtype, start, name="modulation")(condition)
            vectors = vectors.reshape(-1, *shape)
        given = [[vectors[:, branch, i, None] for i in range(self.vectors)] for branch in range(2)]
        return [(*vectors, None)[:3] for vectors in given]

    def self_attention(
        self, y: Array, layer: Array | int, rotation: Array | None, mask: Array | None, cache: Cache | None
    ) -> tuple[Array, Cache | None]:
        """([B,T,width] -> the same, the longer cache)."""
        o = self.options
        qkv = Dense(3 * o.width, self.dtype, bias=o.qkv_bias and self.key_bias, name="qkv")(y)
        q, k, v = jnp.moveaxis(qkv.reshape(*y.shape[:2], 3, o.heads, -1), 2, 0)
        if o.qkv_bias and not self.key_bias:
            q, v = Bias(name="q_bias")(q), Bias(name="v_bias")(v)
        if o.qk_norm:
            q, k = Norm("rms", o.epsilon, name="q_norm")(q), Norm("rms", o.epsilon, name="k_norm")(k)
        if self.cosine:
            q, k = Temperature(name="temperature")(unit(q)), unit(k)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        if cache is not None:
            cache, k, v = cache.extended(layer, k, v)
        y = attention.attention(q, k, v, o.attention, mask).reshape(y.shape)
        return Dense(o.width, self.dtype, bias=self.bias, name="attention_out")(y), cache

    def cross_attention(self, y: Array, context: Array) -> Array:
        """[B,T,width], [B or 1,S,width] -> [B,T,width]; keys and values of one context are computed once."""
        o = self.options
        q = Dense(o.width, self.dtype, bias=o.qkv_bias, name="cross_q")(y).reshape(*y.shape[:2], o.heads, -1)
        kv = Dense(2 * o.width, self.dtype, bias=o.qkv_bias, name="cross_kv")(context)
        kv = jnp.broadcast_to(kv, (len(y), *kv.shape[1:])).reshape(len(y), -1, 2, o.heads, q.shape[-1])
        y = attention.attention(q, *jnp.moveaxis(kv, 2, 0), o.attention).reshape(y.shape)
        return Dense(o.width, self.dtype, bias=self.bias, name="cross_out")(y)


def gated(x: Array, gate: Array | None, y: Array) -> Array:
    """X + gate * y in float32, in x's dtype: a gate's gradient is a sum over all tokens."""
    if gate is None:
        return x + y
    gate = layers.spread(gate[:, 0].astype(jnp.float32), x.shape)
    x, y = jax.lax.optimization_barrier((x, y))
    return (x.astype(jnp.float32) + gate * y.astype(jnp.float32)).astype(x.dtype)


# ---------------------------------------------------------------------------------------------- its parts

NORMS = {"layer": layers.standardise, "rms": layers.rms}
"""Ba et al. 2016; Zhang & Sennrich 2019, which has no mean and no shift."""


class Norm(nn.Module):
    """normalise(x) (1 + scale) + shift in float32, with the scale and shift given, or else the norm's own."""

    kind: str
    epsilon: float

    @nn.compact
    def __call__(self, x: Array, shift: Array | None = None, scale: Array | None = None) -> Array:
        """[..., D] -> the same, in x's dtype; shift and scale are [n,1,D]."""
        y = NORMS[self.kind](x.astype(jnp.float32), axes=(-1,), epsilon=self.epsilon)
        own = lambda name: self.param(name, layers.ZEROS, (x.shape[-1],))
        if scale is None:
            scale = own("scale")
            shift = own("shift") if self.kind == "layer" else None
        over = lambda vectors: layers.spread(vectors.reshape(-1, x.shape[-1]).astype(jnp.float32), x.shape)
        y = y * (1.0 + over(scale))
        return (y if shift is None else y + over(shift)).astype(x.dtype)


class Bias(nn.Module):
    """X + b for each head, with b added in float32."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B,T,heads,d] -> the same."""
        b = self.param("bias", layers.ZEROS, (math.prod(x.shape[2:]),))
        return (x.astype(jnp.float32) + b.reshape(1, 1, *x.shape[2:])).astype(x.dtype)


class Temperature(nn.Module):
    """Unit vectors q times sqrt(d) / tau, so that q k^T / sqrt(d) is a cosine over tau; 1 / tau is 4 at first.

    Attention divides by sqrt(d). 1 / tau stays at or below 100 (Liu et al. 2022: tau > 0.01), and is learned as its
    logarithm.
    """

    @nn.compact
    def __call__(self, q: Array) -> Array:
        """[B,T,heads,d] -> the same."""
        log = self.param("log", nn.initializers.constant(math.log(4.0)), (q.shape[2],))
        scale = math.sqrt(q.shape[3]) * jnp.exp(jnp.minimum(log, math.log(100.0)))
        return (q.astype(jnp.float32) * scale[None, None, :, None]).astype(q.dtype)


def unit(x: Array) -> Array:
    """[..., d] -> the same direction with length 1."""
    y = x.astype(jnp.float32)
    return (y * jax.lax.rsqrt(jnp.sum(jnp.square(y), -1, keepdims=True) + 1e-12)).astype(x.dtype)


def _gelu_mlp(y: Array, o: BlockOptions, dtype: jnp.dtype, bias: bool, approximate: bool = True) -> Array:
    hidden = _rounded_up(int(o.mlp_ratio * o.width), o.multiple_of)
    y = nn.gelu(Dense(hidden, dtype, bias=bias, name="mlp_in")(y), approximate=approximate)
    return Dense(o.width, dtype, bias=bias, name="mlp_out")(y)


def _swiglu(y: Array, o: BlockOptions, dtype: jnp.dtype, bias: bool) -> Array:
    """silu(a) * b (Shazeer 2020, eq. 6), two thirds as wide: as many parameters as the others."""
    hidden = _rounded_up(int(2 * o.mlp_ratio * o.width / 3), o.multiple_of)
    a, b = jnp.split(Dense(2 * hidden, dtype, bias=bias, name="mlp_in")(y), 2, axis=-1)
    return Dense(o.width, dtype, bias=bias, name="mlp_out")(nn.silu(a) * b)


def _rounded_up(n: int, multiple_of: int) -> int:
    return -(-n // multiple_of) * multiple_of


MLPS = {
    "gelu": _gelu_mlp,
    "gelu_erf": lambda *given: _gelu_mlp(*given, approximate=False),
    "swiglu": _swiglu,
}
"""name -> (y [..., width], options, dtype, biases) -> the same; "gelu" is the approximation by tanh."""


def angles_2d(height: int, width: int, features: int) -> np.ndarray:
    """Angles f32[height * width, features / 2] of rotary positions in 2-D, the row's and the column's side by side.

    Su et al. 2021, section 3.4.2, for each axis: position times 10000^(-i / n), i = 0, ..., n - 1, n = features / 4.
    """
    n = features // 4
    frequencies = 10_000.0 ** (-np.arange(n) / n)
    places = np.divmod(np.arange(height * width), width)
    return np.concatenate([place[:, None] * frequencies for place in places], axis=-1).astype(np.float32)


def turns(angles: np.ndarray) -> np.ndarray:
    """Cosines and sines f32[2,T,n] of angles f32[T,n]."""
    return np.stack([np.cos(angles), np.sin(angles)])


def rotate(x: Array, rotation: Array) -> Array:
    """Turn the pairs (x_i, x_(i + d/2)) of x [B,T,heads,d] by `turns` [2,T,d/2]; q k^T depends on distances alone."""
    cosine, sine = rotation[:, None, :, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cosine - b * sine, b * cosine + a * sine], axis=-1).astype(x.dtype)


# ---------------------------------------------------------------------------------------------- around the blocks


def stack(
    block: Callable[..., nn.Module],
    depth: int,
    x: Array,
    keys: Array | None,
    *given: Array | None,
    cache: Cache | None = None,
    policy: str = "none",
    scan: bool = False,
) -> Array | tuple[Array, Cache]:
    """X after `depth` blocks, and the cache with all T tokens of x where one is given.

    Args:
      block: (module class, name) -> a block.
      depth: how many.
      x: [B,T,width].
      keys: see `Block`.
      given: further arguments of `Block.__call__`, the same for all.
      cache: of the tokens before x.
      policy: from `remat.POLICIES`.
      scan: one program for all blocks, whose parameters are stacked along a first axis: the time to compile does not
        grow with the depth. The function is the same.
    """
    kind = remat.block(Block, policy, in_scan=scan)

    def through(block: nn.Module, carry: tuple[Array, Cache | None], layer: Array | int) -> tuple:
        x, cache = carry
        if cache is None:
            return block(x, layer, keys, *given), None
        return block(x, layer, keys, *given, cache=cache)

    carry = x, cache
    if scan:
        body = lambda block, carry, layer: (through(block, carry, layer), None)
        scanned = nn.scan(body, variable_axes={"params": 0, "ready": 0}, split_rngs={"params": True}, length=depth)
        carry = scanned(block(kind, "blocks"), carry, jnp.arange(depth))[0]
    else:
        for layer in range(depth):
            carry = through(block(kind, f"block_{layer}"), carry, layer)
    x, cache = carry
    return x if cache is None else (x, cache._replace(position=cache.position + x.shape[1]))


def cut(x: Array, patch: int) -> Array:
    """Images [B,H,W,C] -> patches [B, H/patch * W/patch, patch^2 C], row by row."""
    B, H, W, C = x.shape
    x = x.reshape(B, H // patch, patch, W // patch, patch, C).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(B, -1, patch**2 * C)


def join(patches: Array, patch: int, height: int, width: int) -> Array:
    """Patches [B,T,patch^2 C] -> images [B,height,width,C]."""
    x = patches.reshape(len(patches), height // patch, width // patch, patch, patch, -1)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(len(patches), height, width, -1)


def prepend(tokens: Array, x: Array) -> Array:
    """Tokens [B or 1, n, width] before x [B,T,width]."""
    return jnp.concatenate([jnp.broadcast_to(tokens.astype(x.dtype), (len(x), *tokens.shape[1:])), x], axis=1)


def unmoved(angles: np.ndarray, tokens: int) -> np.ndarray:
    """Angles of zero for `tokens` that have no place, before those of the others."""
    return np.pad(angles, ((tokens, 0), (0, 0)))


def patch_error(patch: int, size: int) -> str:
    """Why images of `size` pixels cannot be cut into patches, or ""."""
    return "" if size % patch == 0 else f"patch = {patch} must divide the image size {size}"
