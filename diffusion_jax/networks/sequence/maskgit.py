"""MaskGIT's transformer: all masked tokens at once, from those that are there (Chang et al. 2022, section 3.1).

    class, tokens or [MASK]  ->  blocks without a mask  ->  logits of every token

It is BERT's (Devlin et al. 2019): norms behind the sums, learned positions, and logits by the very table that embeds
the tokens. Classes are words of that table, too.
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from diffusion_jax.networks import layers, transformer
from diffusion_jax.networks.layers import Dense
from diffusion_jax.networks.sequence.options import StackOptions
from diffusion_jax.networks.transformer import NORMAL, Norm
from diffusion_jax.types import Array, TokenSpec


@dataclass(frozen=True, kw_only=True)
class MaskGITOptions(StackOptions):
    """Sizes of a MaskGIT, those of `StackOptions` among them.

    The defaults are those of ImageNet at 256 pixels, with dropout off. The published config has 16 heads, the paper
    speaks of 8.

    Attributes:
      null_label: whether "no label" is learned as one more label; it is a token of zeros otherwise.
    """

    width: int = 768
    depth: int = 24
    heads: int = 16
    null_label: bool = True

    def parts(self) -> dict[str, Any]:
        """BERT's block, but for where its norms stand."""
        return {"epsilon": 1e-12}


class MaskGIT(nn.Module):
    """Logits of each token, given those that are not masked."""

    options: MaskGITOptions
    tokens: TokenSpec
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: Array, label: Array | None, keys: Array | None = None) -> Array:
        """See `sequence.Masked.apply`."""
        o, vocabulary, classes = self.options, self.tokens.vocabulary, self.tokens.num_classes
        words = vocabulary + 1 + classes + (o.null_label and classes > 0)
        table = self.param("word", NORMAL, (words, o.width))
        ids = tokens
        if classes:
            label = jnp.full(len(tokens), classes) if label is None else label
            ids = jnp.concatenate([vocabulary + 1 + label[:, None], tokens], axis=1)
        x = jnp.take(table, ids, axis=0, mode="fill", fill_value=0.0)
        x = x + self.param("position", NORMAL, x.shape[1:])[None]

        norm = lambda name: Norm("layer", o.block().epsilon, name=name)
        x = layers.dropout(norm("in_norm")(x).astype(self.dtype), o.dropout, keys, 3 * o.depth)
        x = transformer.stack(self.block, o.depth, x, keys, policy=o.remat, scan=o.scan)[:, -tokens.shape[1] :]

        x = norm("out_norm")(nn.gelu(Dense(o.width, self.dtype, NORMAL, name="out")(x)))
        bias = self.param("word_bias", layers.ZEROS, (words,))
        logits = x.astype(jnp.float32) @ table[:vocabulary].T
        return logits + bias[None, None, :vocabulary]

    def block(self, kind: type[nn.Module], name: str) -> nn.Module:
        """One block of the class `kind`."""
        return kind(self.options.block(), self.dtype, post_norm=True, name=name)
