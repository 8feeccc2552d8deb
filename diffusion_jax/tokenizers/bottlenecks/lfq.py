"""Lookup-free quantisation (Yu et al. 2023, section 3.1): each number of a place is a bit, and the bits are the code.

    z = sign(y),   token = sum_i 2^i [y_i > 0]                                             eq. 3 and 4
    loss = weight (E H[q(c | y)] - H[E q(c | y)]) + beta |y - sg[z]|^2                     eq. 5
    q(c | y) = softmax_c(-|y - c|^2 / tau),   which is   q(c_i = 1 | y) = sigmoid(4 y_i / tau)   in each bit alone

The first entropy asks for sure bits, the second for codes that are used alike. E in the second is over the batch in the
paper, where a part of the batch has another entropy than the whole. Here it is a running mean p over the steps before:
-H is replaced by its tangent there, sum_c q(c | y) log p(c), which has the same gradient where p = E q.

Of many bits the second entropy is taken of `joint` bits at a time: 2^bits shares would be too many.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax.tokenizers.bottlenecks import codes
from diffusion_jax.tokenizers.bottlenecks.base import Passed
from diffusion_jax.types import Array, Tree

MOST = 24
"""Bits: counts of codes are exact in float32, and a share of each is memory to keep."""


class Expected(NamedTuple):
    """The running mean of q, in G groups of bits that are taken jointly.

    Attributes:
      step: i32[], of which `sums` are.
      shares: f32[G,2^joint], p before that step.
      sums: f32[G,2^joint], of q over the step's places so far.
      places: f32[], how many these are.
    """

    step: Array
    shares: Array
    sums: Array
    places: Array


@dataclass(frozen=True, kw_only=True)
class LFQ:
    """See above; a row of `BOTTLENECKS`.

    Attributes:
      bits: numbers a place; 2^bits codes.
      weight: of the entropies.
      beta: of the term that holds the encoder to its codes.
      temperature: tau.
      joint: bits that are taken together in the second entropy; all where there are fewer, and a divisor of `bits`.
    """

    bits: int = 8
    weight: float = 0.1
    beta: float = 0.25
    temperature: float = 1.0
    joint: int = 8

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= MOST:
            raise ValueError(f"bits must be from 1 to {MOST}, not {self.bits}")
        if self.joint < 1 or (self.bits > self.joint and self.bits % self.joint):
            raise ValueError(f"joint must be a divisor of bits = {self.bits}, or more, not {self.joint}")
        if min(self.weight, self.beta) < 0.0:
            raise ValueError("weight and beta must not be negative")
        if not self.temperature > 0.0:
            raise ValueError(f"temperature must be positive, not {self.temperature}")

    @property
    def latents(self) -> int:
        """See `Bottleneck`."""
        return self.bits

    outputs = latents

    @property
    def digits(self) -> tuple[int, ...]:
        """See `Bottleneck`."""
        return (2,) * self.bits

    def init(self, key: Array) -> tuple[Tree, Tree]:
        """See `Bottleneck`: p begins uniform."""
        together = min(self.joint, self.bits)
        shares = jnp.full((self.bits // together, 2**together), 2.0**-together)
        expected = Expected(step=jnp.int32(-1), shares=shares, sums=jnp.zeros_like(shares), places=jnp.float32(0.0))
        return {}, {"usage": codes.begin(2**self.bits), "expected": expected}

    # ------------------------------------------------------------------------------------------ there and back

    def encode(self, params: Tree, y: Array, keys: Array | None) -> Array:
        """See `Bottleneck`."""
        return codes.token((y > 0.0).astype(jnp.int32), self.digits)

    def decode(self, params: Tree, given: Array) -> Array:
        """See `Bottleneck`: -1 or 1 in each number."""
        return 2.0 * codes.digits(given, self.digits).astype(jnp.float32) - 1.0

    def nearest(self, params: Tree, z: Array) -> Array:
        """See `Bottleneck`."""
        return self.decode(params, self.encode(params, z, None))

    def settle(self, params: Tree, extra: Tree) -> Tree:
        """See `Bottleneck`."""
        return params

    # ------------------------------------------------------------------------------------------ training

    def train(self, params: Tree, extra: Tree, y: Array, keys: Array, step: Array) -> Passed:
        """See `Bottleneck`."""
        tokens = self.encode(params, y, keys)
        z = self.decode(params, tokens)
        logits = 4.0 * y / self.temperature
        q = self.soft_codes(logits)
        expected = begun(extra["expected"], step)
        sure = jnp.sum(bit_entropy(logits), axis=-1)
        alike = jnp.sum(q * jnp.log(jnp.maximum(expected.shares, 1e-30))[None, None, None], axis=(-2, -1))
        held = jnp.mean(jnp.square(y - z), axis=-1)
        loss = jnp.mean(self.weight * (sure + alike) + self.beta * held, axis=(1, 2))
        usage = codes.counted(extra["usage"], step, tokens)
        after = {"usage": usage, "expected": jax.lax.stop_gradient(gathered(expected, q))}
        metrics = {"entropy": jnp.mean(sure)} | codes.metrics(usage)
        return Passed(z=codes.straight_through(y, z), loss=loss, metrics=metrics, extra=after)

    def soft_codes(self, logits: Array) -> Array:
        """q f32[B,h,w,G,2^joint] of each group's codes, from the logits f32[B,h,w,bits] that a bit is 1."""
        ones = jax.nn.sigmoid(logits).reshape(*logits.shape[:-1], -1, min(self.joint, self.bits))
        q = jnp.ones((*ones.shape[:-1], 1))
        for i in range(ones.shape[-1]):
            one = ones[..., i : i + 1]
            q = jnp.concatenate([q * (1.0 - one), q * one], axis=-1)
        return q


def bit_entropy(logits: Array) -> Array:
    """H f[...] in nats of bits that are 1 with probability sigmoid(logits)."""
    return jax.nn.softplus(logits) - logits * jax.nn.sigmoid(logits)


def begun(expected: Expected, step: Array) -> Expected:
    """At the beginning of `step`, with the sums of the step before in p; as it is within the step."""
    mean = expected.sums / jnp.maximum(expected.places, 1.0)
    shares = jnp.where(
        expected.places > 0.0, codes.DECAY * expected.shares + (1.0 - codes.DECAY) * mean, expected.shares
    )
    after = Expected(step=step, shares=shares, sums=jnp.zeros_like(mean), places=jnp.zeros_like(expected.places))
    return jax.tree.map(lambda a, b: jnp.where(step != expected.step, a, b), after, expected)


def gathered(expected: Expected, q: Array) -> Expected:
    """With q f32[B,h,w,G,2^joint] of a batch in it."""
    places = q.shape[0] * q.shape[1] * q.shape[2]
    return expected._replace(sums=expected.sums + jnp.sum(q, axis=(0, 1, 2)), places=expected.places + places)
