"""VAR: next-scale prediction, all tokens of one scale at once, given the coarser scales (Tian et al. 2024, section 3).

    class; scales 1, ..., K - 1, upsampled to the next  ->  blocks, causal by scale  ->  logits of scales 1, ..., K

The input in the places of scale k is what the tokens of the scales before it amount to, as vectors of the tokenizer's
width at the size of scale k. Every block is modulated by the class.
"""

import math
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.networks import layers, transformer
from diffusion_jax.networks.layers import Dense
from diffusion_jax.networks.sequence.options import StackOptions
from diffusion_jax.networks.transformer import Cache, Norm
from diffusion_jax.types import Array, TokenSpec


@dataclass(frozen=True, kw_only=True)
class VAROptions(StackOptions):
    """Sizes of a VAR, those of `StackOptions` among them. The defaults are VAR-d16's.

    Attributes:
      shared_modulation: one layer gives the modulation of all blocks, each of which adds a table of its own.
    """

    width: int = 1024
    depth: int = 16
    heads: int = 16
    shared_modulation: bool = False


class VAR(nn.Module):
    """Logits of each scale's tokens, given the scales before it."""

    options: VAROptions
    tokens: TokenSpec
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, vectors: Array, label: Array | None, keys: Array | None = None, cache: Cache | None = None
    ) -> Array | tuple[Array, Cache]:
        """See `sequence.Scales`: `apply` without a cache; `step` with one, of one scale's `vectors`."""
        o, L, sides = self.options, self.tokens.length, self.tokens.scales
        start = nn.initializers.normal(math.sqrt(1.0 / (3.0 * o.width)))
        table = self.param("label", start, (self.tokens.num_classes + 1, o.width))
        shown = table[jnp.full(len(vectors), self.tokens.num_classes) if label is None else label]

        x = Dense(o.width, self.dtype, name="in")(vectors)
        first = (shown[:, None] + self.param("first", start, (1, o.width))[None]).astype(self.dtype)
        positions = self.param("position", start, (L, o.width))
        positions = positions + self.param("scale", start, (len(sides), o.width))[self.scale_of_each()]
        if cache is None:
            x, mask = jnp.concatenate([first, x], axis=1), self.mask()[None]
        else:
            x = jnp.where(cache.position == 0, first, x)  # the first scale has one token
            positions = jax.lax.dynamic_slice_in_dim(positions, cache.position, x.shape[1], axis=0)
            mask = jnp.broadcast_to(jnp.arange(L) < cache.position + x.shape[1], (1, x.shape[1], L))
        x = x + positions[None].astype(self.dtype)

        condition = modulation = nn.silu(shown).astype(self.dtype)
        if o.shared_modulation:
            modulation = Dense(6 * o.width, self.dtype, layers.ZEROS, name="modulation")(condition)
        given = (modulation, None, None, mask)
        x = transformer.stack(self.block, o.depth, x, keys, *given, cache=cache, policy=o.remat, scan=o.scan)
        x, cache = (x, None) if cache is None else x

        out = Dense(2 * o.width, self.dtype, layers.ZEROS, name="out_modulation")(condition)
        shift, scale = jnp.split(out[:, None], 2, axis=-1)
        x = Norm("layer", o.block().epsilon, name="out_norm")(x, shift, scale)
        logits = Dense(self.tokens.vocabulary, jnp.float32, layers.ZEROS, name="out")(x)
        return logits if cache is None else (logits, cache)

    def scale_of_each(self) -> np.ndarray:
        """The number of the scale i32[L] that each token belongs to."""
        sides = self.tokens.scales
        return np.repeat(np.arange(len(sides)), [side**2 for side in sides])

    def mask(self) -> np.ndarray:
        """bool[L,L]: a token sees its own scale and those before it."""
        scale = self.scale_of_each()
        return scale[:, None] >= scale[None]

    def block(self, kind: type[nn.Module], name: str) -> nn.Module:
        """One block of the class `kind`."""
        o = self.options
        return kind(o.block(), self.dtype, 3, o.shared_modulation, key_bias=False, cosine=True, name=name)
