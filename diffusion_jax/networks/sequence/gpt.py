"""GPT over the tokens of an image, in raster order (LlamaGen: Sun et al. 2024, section 2.2).

    class, token 0, ..., token T - 2  ->  causal blocks  ->  logits of token 0, ..., token T - 1

The blocks are Llama's (Touvron et al. 2023): RMS norms before the branches, SwiGLU, no biases, and rotary positions,
here in 2-D. The class is the first token; where there are none it is one learned beginning.
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.networks import layers, transformer
from diffusion_jax.networks.layers import Dense
from diffusion_jax.networks.sequence.options import StackOptions
from diffusion_jax.networks.transformer import NORMAL, Cache, Norm
from diffusion_jax.types import Array, TokenSpec


@dataclass(frozen=True, kw_only=True)
class GPTOptions(StackOptions):
    """Sizes of a GPT, those of `StackOptions` among them. The defaults are those of LlamaGen-B.

    width / heads is divisible by 4.

    Attributes:
      multiple_of: SwiGLU's hidden width is rounded up to a multiple of this.
    """

    width: int = 768
    depth: int = 12
    heads: int = 12
    multiple_of: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.width // self.heads) % 4:
            raise ValueError(f"width / heads must be divisible by 4, and {self.width // self.heads} is not")

    def parts(self) -> dict[str, Any]:
        """Llama's block."""
        of_mlp = {"mlp": "swiglu", "multiple_of": self.multiple_of}
        return of_mlp | {"norm": "rms", "epsilon": 1e-5, "qkv_bias": False}


class GPT(nn.Module):
    """Logits of each token, given those before it."""

    options: GPTOptions
    tokens: TokenSpec
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, tokens: Array, label: Array | None, keys: Array | None = None, cache: Cache | None = None
    ) -> Array | tuple[Array, Cache]:
        """See `sequence.Causal`: `apply` without a cache; `step` with one, of `tokens` i32[B], those before."""
        o, T = self.options, self.tokens.length
        first = self.param("label", NORMAL, (self.tokens.num_classes + 1, o.width))
        first = first[jnp.full(len(tokens), self.tokens.num_classes) if label is None else label]
        if cache is None:
            x = jnp.concatenate([first[:, None], self.embedded(tokens[:, :-1], jnp.arange(T - 1))], axis=1)
            rotation, mask = self.rotation(), np.tri(T, dtype=bool)[None]
        else:
            at = cache.position
            x = jnp.where(at == 0, first[:, None], self.embedded(tokens[:, None], at[None] - 1))
            rotation = jax.lax.dynamic_slice_in_dim(jnp.asarray(self.rotation()), at, 1, axis=1)
            mask = (jnp.arange(T) <= at)[None, None]

        x = layers.dropout(x.astype(self.dtype), o.dropout, keys, 3 * o.depth)
        given = (None, None, rotation, mask)
        x = transformer.stack(self.block, o.depth, x, keys, *given, cache=cache, policy=o.remat, scan=o.scan)
        x, cache = (x, None) if cache is None else x
        x = Norm("rms", o.block().epsilon, name="out_norm")(x)
        logits = Dense(self.tokens.vocabulary, jnp.float32, layers.ZEROS, bias=False, name="out")(x)
        return logits if cache is None else (logits[:, 0], cache)

    def embedded(self, tokens: Array, index: Array) -> Array:
        """Vectors [B,n,width] of `tokens` i32[B,n], whose numbers in the sequence are `index` i32[n]."""
        x = self.param("token", NORMAL, (self.tokens.vocabulary, self.options.width))[tokens]
        of_place = self.tokens.grid[2]
        if of_place == 1:
            return x
        return x + self.param("of_place", NORMAL, (of_place, self.options.width))[index % of_place][None]

    def rotation(self) -> np.ndarray:
        """Cosines and sines f32[2,T,n] of what the blocks see: the class, which has no place, and all tokens but one.

        Several tokens of one place are turned alike; `embedded` tells them apart.
        """
        h, w, d = self.tokens.grid
        angles = np.repeat(transformer.angles_2d(h, w, self.options.width // self.options.heads), d, axis=0)
        return transformer.turns(transformer.unmoved(angles[:-1], 1))

    def block(self, kind: type[nn.Module], name: str) -> nn.Module:
        """One block of the class `kind`."""
        return kind(self.options.block(), self.dtype, bias=False, name=name)
