"""What all ways of decoding share: how a token is drawn from logits, how labels guide, how wrong logits are."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from diffusion_jax import rng
from diffusion_jax.types import Array

READS = ("guidance", "temperature", "top_k", "top_p")
"""The fields of the config's `sample` section that become `Options`."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `generate`, all traced: new values compile nothing."""

    guidance: Array  # f32[]
    temperature: Array  # f32[]
    top_k: Array  # i32[], 0 for all
    top_p: Array  # f32[]


# ---------------------------------------------------------------------------------------------- a token from logits


def draw(keys: Array, logits: Array, options: Options) -> Array:
    """Tokens i32[n,...], each drawn with key[n] from softmax(logits / temperature) f32[n,...,V] among those `kept`.

    By argmax(logits + temperature * Gumbel noise), which at temperature 0 is the likeliest token.
    """
    noise = rng.draw(keys, lambda key: jax.random.gumbel(key, logits.shape[1:]))
    cut = (options.top_k > 0) | (options.top_p < 1.0)
    allowed = jax.lax.cond(cut, lambda: _allowed(logits, options), lambda: logits)  # nothing is sorted for nothing
    return jnp.argmax(allowed + options.temperature * noise, axis=-1).astype(jnp.int32)


def _allowed(logits: Array, options: Options) -> Array:
    """The logits, -inf for tokens that are not kept."""
    scaled = logits / jnp.maximum(options.temperature, 1e-4)
    return jnp.where(kept(scaled, options.top_k, options.top_p), logits, -jnp.inf)


def kept(logits: Array, top_k: Array, top_p: Array) -> Array:
    """bool[...,V]: the `top_k` largest of logits f32[...,V], and of these the fewest that hold `top_p` of their mass.

    The latter is the nucleus (Holtzman et al. 2020, eq. 2 and 3), taken of the distribution that top-k has left. Of
    equal logits the first come first. top_k i32[] = 0 and top_p f32[] = 1 leave all.
    """
    order = jnp.argsort(-logits, axis=-1, stable=True)
    rank = jnp.argsort(order, axis=-1)
    largest = rank < jnp.where(top_k > 0, top_k, logits.shape[-1])
    p = jnp.take_along_axis(jax.nn.softmax(jnp.where(largest, logits, -jnp.inf), axis=-1), order, axis=-1)
    before = jnp.cumsum(p, axis=-1) - p
    nucleus = jnp.take_along_axis(before < top_p, rank, axis=-1)
    return largest & (nucleus | (top_p >= 1.0))


# ---------------------------------------------------------------------------------------------- guidance


@dataclass(frozen=True, kw_only=True)
class Shown:
    """The labels that a network is shown: the images' own, or in a doubled batch these and then none at all.

    With both, the logits l become l(none) + weight (l(label) - l(none)) (Ho & Salimans 2022, eq. 6; of logits: Chang et
    al. 2023, eq. 1).

    Attributes:
      label: i32[copies * n], or None for data without classes.
      weight: f32[], or None without the second copy.
    """

    label: Array | None
    weight: Array | None = None

    @classmethod
    def both(cls, label: Array, null: int, weight: Array) -> "Shown":
        """Of labels i32[n], and of the label that stands for none."""
        return cls(label=jnp.concatenate([label, jnp.full_like(label, null)]), weight=weight)

    @property
    def copies(self) -> int:
        """How often each image stands in the batch."""
        return 1 if self.weight is None else 2

    def grown(self, share: Array, grows: Array) -> "Shown":
        """With the weight 1 + (weight - 1) share where it `grows` bool[]: from 1 on, as the share f32[...] from 0."""
        if self.weight is None:
            return self
        return replace(self, weight=jnp.where(grows, 1.0 + (self.weight - 1.0) * share, self.weight))

    def repeated(self, x: Array) -> Array:
        """[n,...] -> [copies * n,...]."""
        return jnp.concatenate([x] * self.copies)

    def merged(self, logits: Array) -> Array:
        """[copies * n,...] -> [n,...]."""
        if self.weight is None:
            return logits
        with_label, without = jnp.split(logits, 2)
        return without + self.weight * (with_label - without)


# ---------------------------------------------------------------------------------------------- the loss of logits


def cross_entropy(logits: Array, tokens: Array, smoothing: float = 0.0) -> Array:
    """Nats f32[...] that tokens i32[...] cost under logits f32[...,V].

    With smoothing s the target is 1 - s on the token and s spread over all V (Szegedy et al. 2016, section 7).
    """
    log_p = jax.nn.log_softmax(logits, axis=-1)
    nats = -jnp.take_along_axis(log_p, tokens[..., None], axis=-1)[..., 0]
    return nats if smoothing == 0.0 else (1.0 - smoothing) * nats - smoothing * jnp.mean(log_p, axis=-1)
