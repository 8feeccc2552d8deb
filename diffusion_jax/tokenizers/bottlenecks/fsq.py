"""Finite scalar quantisation (Mentzer et al. 2023, section 3, listing in the appendix): a grid in place of a codebook.

    f(y) = (L - 1)/2 (1 - 1e-3) tanh(y + shift) - offset          offset = 1/2 for even L, else 0
    z = round(f(y)) / floor(L / 2)                                one of L values in [-1, 1], in each number of a place
    token = sum_i (round(f(y_i)) + floor(L_i / 2)) prod_(j < i) L_j

The shift brings f(0) near the middle value. Every combination of values is a code, and there is nothing to collapse.
"""

import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from diffusion_jax.tokenizers.bottlenecks import codes
from diffusion_jax.tokenizers.bottlenecks.base import Passed
from diffusion_jax.types import Array, Tree

LARGEST = 2**24
"""Codes: their counts are exact in float32, and a share of them is memory to keep."""


@dataclass(frozen=True, kw_only=True)
class FSQ:
    """See above; a row of `BOTTLENECKS`.

    Attributes:
      levels: L_i, how many values each number of a place can take.
    """

    levels: tuple = (8, 5, 5, 5)

    def __post_init__(self) -> None:
        if not self.levels or any(not isinstance(L, int) or not 2 <= L <= 256 for L in self.levels):
            raise ValueError(f"levels must be whole numbers from 2 to 256, not {self.levels}")
        if math.prod(self.levels) > LARGEST:
            raise ValueError(f"levels must have a product of at most {LARGEST}, and {math.prod(self.levels)} is more")

    @property
    def latents(self) -> int:
        """See `Bottleneck`."""
        return len(self.levels)

    outputs = latents

    @property
    def digits(self) -> tuple[int, ...]:
        """See `Bottleneck`."""
        return self.levels

    def init(self, key: Array) -> tuple[Tree, Tree]:
        """See `Bottleneck`: counts for the log are all."""
        return {}, {"usage": codes.begin(math.prod(self.levels))}

    def bounded(self, y: Array) -> Array:
        """f(y) f32[...,latents]: where its rounding has L values."""
        L = np.array(self.levels)
        half, offset = (L - 1) / 2 * (1.0 - 1e-3), np.where(L % 2 == 0, 0.5, 0.0)
        half, offset, shift = (codes.along_last(a, y.ndim) for a in (half, offset, np.tan(offset / half)))
        return half * jnp.tanh(y + shift) - offset

    def halves(self, rank: int) -> Array:
        """floor(L / 2) f32[1,...,latents] of the given rank."""
        return codes.along_last(np.array(self.levels) // 2, rank)

    def train(self, params: Tree, extra: Tree, y: Array, keys: Array, step: Array) -> Passed:
        """See `Bottleneck`: there is no loss, and the gradient is that of f(y) / floor(L / 2)."""
        tokens = self.encode(params, y, keys)
        usage = codes.counted(extra["usage"], step, tokens)
        z = codes.straight_through(self.bounded(y) / self.halves(y.ndim), self.decode(params, tokens))
        return Passed(z=z, loss=jnp.zeros(len(y)), metrics=codes.metrics(usage), extra={"usage": usage})

    def encode(self, params: Tree, y: Array, keys: Array | None) -> Array:
        """See `Bottleneck`."""
        return codes.token((jnp.round(self.bounded(y)) + self.halves(y.ndim)).astype(jnp.int32), self.levels)

    def decode(self, params: Tree, given: Array) -> Array:
        """See `Bottleneck`."""
        halves = self.halves(given.ndim + 1)
        return (codes.digits(given, self.levels).astype(jnp.float32) - halves) / halves

    def nearest(self, params: Tree, z: Array) -> Array:
        """See `Bottleneck`."""
        halves, levels = self.halves(z.ndim), codes.along_last(self.levels, z.ndim)
        return jnp.clip(jnp.round(z * halves), -halves, levels - 1 - halves) / halves

    def settle(self, params: Tree, extra: Tree) -> Tree:
        """See `Bottleneck`."""
        return params
