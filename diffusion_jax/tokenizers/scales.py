"""Tokens of K scales, each of which says what those before it have left of f (Tian et al. 2024, section 3.2).

    f^ = 0;   for k = 1, ..., K:   r_k = token(area(f - f^, h_k)),   f^ <- f^ + vectors_k(r_k)          Algorithm 1
    f^ = 0;   for k = 1, ..., K:   f^ <- f^ + vectors_k(r_k)                                            Algorithm 2

Scale k is a grid of h_k x h_k tokens; f, f^ and `vectors_k` have the size of the last, h_K. What a model of scale k + 1
is shown is area(f^, h_(k+1)), the same in training and in sampling.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.types import Array, Tree


@dataclass(frozen=True, kw_only=True)
class Scales:
    """See above. Tokens i32[B,L] are those of one scale after the other, each in raster order.

    Attributes:
      sides: h_1, ..., h_K.
      channels: of f.
      token: (params, r f32[B,h,h,channels]) -> i32[B,h,h].
      vectors: (params, tokens i32[B,h_k,h_k], k from 0 on) -> f32[B,h_K,h_K,channels].
      params: what these two are given; `bound` sets it.
    """

    sides: tuple[int, ...]
    channels: int
    token: Callable[[Tree, Array], Array]
    vectors: Callable[[Tree, Array, int], Array]
    params: Tree = None

    def bound(self, params: Tree) -> "Scales":
        """The same, with the parameters of a tokenizer."""
        return replace(self, params=params)

    @property
    def length(self) -> int:
        """L."""
        return sum(side**2 for side in self.sides)

    # ------------------------------------------------------------------------------------------ scale by scale

    def begin(self, count: int) -> Array:
        """f^ f32[count,h_K,h_K,channels] before there is a token."""
        return jnp.zeros((count, self.sides[-1], self.sides[-1], self.channels))

    def added(self, f_hat: Array, k: int, tokens: Array) -> Array:
        """f^ with the tokens i32[B,h_k^2] of scale k = 0, 1, ... in it."""
        return f_hat + self.vectors(self.params, tokens.reshape(-1, self.sides[k], self.sides[k]), k)

    def shown(self, f_hat: Array, k: int) -> Array:
        """f^ at the size of scale k: f32[B,h_k^2,channels]."""
        return area(f_hat, self.sides[k]).reshape(len(f_hat), -1, self.channels)

    # ------------------------------------------------------------------------------------------ all at once

    def encode(self, f: Array) -> tuple[Array, Array]:
        """(Tokens i32[B,L], the r f32[B,L,channels] that they stand for) of f f32[B,h_K,h_K,channels]."""
        f_hat, tokens, given = self.begin(len(f)), [], []
        for k, side in enumerate(self.sides):
            r = area(f - f_hat, side)
            given.append(r.reshape(len(f), -1, self.channels))
            tokens.append(self.token(self.params, r).reshape(len(f), -1))
            f_hat = self.added(f_hat, k, tokens[-1])
        return jnp.concatenate(tokens, axis=1), jnp.concatenate(given, axis=1)

    def stages(self, tokens: Array) -> list[Array]:
        """f^ after each scale of tokens i32[B,L]."""
        f_hat, found = self.begin(len(tokens)), []
        ends = np.cumsum([side**2 for side in self.sides])
        for k, part in enumerate(jnp.split(tokens, ends[:-1], axis=1)):
            f_hat = self.added(f_hat, k, part)
            found.append(f_hat)
        return found

    def inputs(self, tokens: Array) -> Array:
        """What a model of scales 2, ..., K is shown of tokens i32[B,L]: f32[B,L-1,channels]."""
        before = self.stages(tokens)[:-1]
        return jnp.concatenate([self.shown(f_hat, k) for k, f_hat in enumerate(before, 1)], axis=1)


def check(sides: tuple) -> None:
    """Raise ValueError unless `sides` are those of scales."""
    whole = all(isinstance(side, int) for side in sides)
    if not whole or len(sides) < 2 or sides[0] != 1 or list(sides) != sorted(set(sides)):
        raise ValueError(f"scales must rise from 1, not {sides}")


# ---------------------------------------------------------------------------------------------- other sizes


def area(x: Array, side: int) -> Array:
    """Means f32[B,side,side,C] of x f32[B,n,n,C] over cells, of which the i-th begins at floor(i n / side).

    It ends before ceil((i + 1) n / side), so cells overlap where `side` does not divide n. Sums are divided once, so
    that means of whole numbers are rounded once.
    """
    n = x.shape[1]
    i, j = np.arange(side)[:, None], np.arange(n)[None]
    cell = ((i * n // side <= j) & (j < -(-(i + 1) * n // side))).astype(np.float32)
    count = cell.sum(1)
    return along(x, cell) / (count[:, None] * count)[None, :, :, None]


def bicubic(x: Array, side: int) -> Array:
    """X f32[B,n,n,C] at the size side x side by Keys' kernel with a = -3/4; beyond the border its pixels go on.

    Equation 4 of Keys 1981; -3/4 as in PyTorch's "bicubic".
    """
    n, a = x.shape[1], -0.75
    place = (np.arange(side) + 0.5) * n / side - 0.5
    taps = np.floor(place).astype(int)[:, None] + np.arange(-1, 3)
    s = np.abs(place[:, None] - taps)
    near = (a + 2.0) * s**3 - (a + 3.0) * s**2 + 1.0
    far = a * s**3 - 5.0 * a * s**2 + 8.0 * a * s - 4.0 * a
    weight = np.zeros((side, n), np.float32)
    np.add.at(weight, (np.arange(side)[:, None], np.clip(taps, 0, n - 1)), np.where(s <= 1.0, near, far))
    return along(x, weight)


def along(x: Array, matrix: np.ndarray) -> Array:
    """The matrix f32[m,n] applied to both axes of x f32[B,n,n,C]: f32[B,m,m,C]."""
    return jnp.einsum("ih,bhwc,jw->bijc", matrix, x, matrix, precision=jax.lax.Precision.HIGHEST)
