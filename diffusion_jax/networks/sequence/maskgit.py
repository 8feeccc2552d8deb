"""MaskGIT's transformer: all masked tokens at once, from those that are there (Chang et al. 2022, section 3.1).

    class, tokens or [MASK]  ->  blocks without a mask  ->  logits of every token

It is BERT's (Devlin et al. 2019): norms behind the sums, learned positions, and logits by the very table that embeds
the tokens. Classes are words of that table, too.
"""

from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp

from diffusion_jax.networks import layers, remat, transformer
from diffusion_jax.networks.layers import Dense
from diffusion_jax.networks.transformer import NORMAL, BlockOptions, Norm
from diffusion_jax.types import Array, TokenSpec


@dataclass(frozen=True, kw_only=True)
class MaskGITOptions:
    """Sizes of a MaskGIT. The defaults are those of ImageNet at 256 pixels, with dropout off.

    Attributes:
      width: of the residual stream; divisible by 4 and by `heads`.
      depth: number of blocks.
      heads: of each attention; the published config has 16, the paper speaks of 8.
      mlp_ratio: width of the MLP's hidden layer over `width`.
      null_label: whether "no label" is learned as one more label; it is a token of zeros otherwise.
      dropout: probability in the tokens that enter and in the outputs of attention and MLP.
      attention: a row of `attention.IMPLEMENTATIONS`, or "auto".
      scan: compile one block for all; its parameters are stacked.
      remat: from `remat.POLICIES`, what the backward pass keeps of each block.
    """

    width: int = 768
    depth: int = 24
    heads: int = 16
    mlp_ratio: float = 4.0
    null_label: bool = True
    dropout: float = 0.0
    attention: str = "auto"
    scan: bool = False
    remat: str = "none"

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise ValueError(f"depth must be at least 1, not {self.depth}")
        remat.check(self.remat)
        self.block()

    def block(self) -> BlockOptions:
        """BERT's block, but for where its norms stand."""
        return BlockOptions(
            width=self.width,
            heads=self.heads,
            mlp_ratio=self.mlp_ratio,
            epsilon=1e-12,
            dropout=self.dropout,
            attention=self.attention,
        )


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
