"""Codes: how often each is used, how it is written in digits, and the gradient that goes past its rounding.

    p_k <- gamma p_k + (1 - gamma) n_k / n          n_k of a step's n tokens are code k
    perplexity = exp(-sum_k p_k log p_k)            K where all codes are used alike, 1 where only one is

p begins at 0, and after n steps adds up to 1 - gamma^n. A step's counts are gathered over its microbatches and join p
when the next step begins.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.types import Array

DECAY = 0.99
"""gamma: p remembers about a hundred steps."""

RARE = 0.01
"""A code counts as used where its share is at least this, over the 1 / K that it has where all are used alike."""


class Usage(NamedTuple):
    """Running shares of K codes.

    Attributes:
      step: i32[], of which `counts` are.
      shares: f32[K], p before that step; all 0 before there is any.
      counts: f32[K], n_k of that step, so far.
      unseen: f32[], gamma^n before that step: what p still lacks.
      memory: f32[], how many tokens p remembers before that step: the sum of n over steps, each gamma^its age.
    """

    step: Array
    shares: Array
    counts: Array
    unseen: Array
    memory: Array


def begin(codes: int) -> Usage:
    """Of `codes` codes, none of which has been seen."""
    zeros = jnp.zeros(codes)
    return Usage(step=jnp.int32(-1), shares=zeros, counts=zeros, unseen=jnp.float32(1.0), memory=jnp.float32(0.0))


def folded(usage: Usage) -> Array:
    """p f32[K] with `counts` in it; as it was where there are none."""
    return folded_in(usage, usage.shares, usage.counts)


def folded_in(usage: Usage, running: Array, sums: Array) -> Array:
    """A running mean f32[K,...] over tokens, with the `sums` f32[K,...] of the step in it; see `folded`."""
    n = jnp.sum(usage.counts)
    return jnp.where(n > 0.0, DECAY * running + (1.0 - DECAY) * sums / jnp.maximum(n, 1.0), running)


def ended(usage: Usage) -> Usage:
    """Once its step is over: with `counts` in what is remembered, and none left; as it was where there are none."""
    n = jnp.sum(usage.counts)
    return usage._replace(
        shares=folded(usage),
        counts=jnp.zeros_like(usage.counts),
        unseen=jnp.where(n > 0.0, DECAY, 1.0) * usage.unseen,
        memory=jnp.where(n > 0.0, DECAY, 1.0) * usage.memory + n,
    )


def counted(usage: Usage, step: Array, tokens: Array) -> Usage:
    """With the tokens i32[...] of `step` i32[], or of one of its microbatches, in it."""
    now = jax.tree.map(lambda a, b: jnp.where(step != usage.step, a, b), ended(usage), usage)
    return now._replace(step=step, counts=now.counts + count(tokens, len(now.counts)))


def since_uniform(usage: Usage) -> Array:
    """p f32[K] with `counts` in it, as if all codes had been used alike before: it adds up to 1 from the beginning.

    A code that is never used falls below r / K after log r / log gamma steps: 69 for r = 1/2, 459 for r = 1/100.
    """
    after = ended(usage)
    return after.shares + after.unseen / len(after.shares)


def count(tokens: Array, codes: int) -> Array:
    """How often each code stands in tokens i32[...]: f32[codes]."""
    return jnp.zeros(codes).at[tokens.reshape(-1)].add(1.0)


def metrics(usage: Usage) -> dict[str, Array]:
    """For the log.

    `perplexity`; `usage`, the share of codes that are not rare; and `usable`, the share that would have been seen in as
    many tokens as p remembers, were all codes used alike: 1 - exp(-tokens / K).
    """
    after = ended(usage)
    shares = after.shares / jnp.maximum(jnp.sum(after.shares), 1e-30)
    return {
        "perplexity": perplexity(shares),
        "usage": jnp.mean((shares >= RARE / len(shares)).astype(jnp.float32)),
        "usable": -jnp.expm1(-after.memory / len(shares)),
    }


def perplexity(shares: Array) -> Array:
    """exp(-sum_k p_k log p_k) f[] of shares f[K] that add up to 1."""
    return jnp.exp(-jnp.sum(jax.scipy.special.xlogy(shares, shares)))


def token(digits: Array, bases: tuple[int, ...]) -> Array:
    """sum_i digit_i prod_(j < i) base_j: a code i32[...] of its digits i32[...,n], the first of which runs fastest."""
    return jnp.sum(digits * along_last(np.cumprod([1, *bases[:-1]]), digits.ndim, jnp.int32), axis=-1)


def digits(token: Array, bases: tuple[int, ...]) -> Array:
    """The digits i32[...,n] of a code i32[...]."""
    found = []
    for base in bases:
        found, token = [*found, token % base], token // base
    return jnp.stack(found, axis=-1)


def of_normal(z: Array, bases: tuple[int, ...]) -> Array:
    """The code i32[...] whose digit i of base b is floor(b Phi(z_i)), of z f32[...,n]: uniform where z is N(0, 1)."""
    b = along_last(bases, z.ndim)
    found = jnp.clip(jnp.floor(b * jax.scipy.special.ndtr(z)), 0.0, b - 1.0)
    return token(found.astype(jnp.int32), bases)


def to_normal(token: Array, bases: tuple[int, ...]) -> Array:
    """The z f32[...,n] in the middle of what `of_normal` reads as the code i32[...]."""
    found = digits(token, bases).astype(jnp.float32)
    return jax.scipy.special.ndtri((found + 0.5) / along_last(bases, found.ndim))


def along_last(values: Sequence[float], rank: int, dtype: jnp.dtype = jnp.float32) -> Array:
    """Values as an array [1,...,1,n] of the given rank."""
    return jnp.asarray(values, dtype).reshape((1,) * (rank - 1) + (-1,))


def straight_through(y: Array, z: Array) -> Array:
    """z, whose gradient is taken for that of y: dz/dy = 1 (van den Oord et al. 2017, section 3.2; Bengio et al. 2013).

    Both have one shape. To the bit z, which z - y + y would not be.
    """
    return jax.lax.stop_gradient(z) + (y - jax.lax.stop_gradient(y))
