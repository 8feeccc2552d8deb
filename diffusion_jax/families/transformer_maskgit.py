"""Masked tokens, many at once (MaskGIT: Chang et al. 2022).

Training (section 3.1) hides a share gamma(r) of the tokens, r uniform in [0, 1), and asks for those. Decoding (section
3.2) begins with nothing but masks. Each of S steps draws all that are masked, keeps those that it is surest of, and
hides the others again; of N tokens there are floor(N gamma(s / S)) still masked after step s.

    gamma(r) = cos(pi r / 2)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import rng
from diffusion_jax.errors import require
from diffusion_jax.families import transformer_draws
from diffusion_jax.families.transformer_draws import Shown, cross_entropy, draw
from diffusion_jax.networks.sequence import Masked
from diffusion_jax.types import Array, Metrics, TokenSpec, Tree

STEPS, CHOICE_TEMPERATURE = 8, 4.5
"""Where nothing is said: 8 steps as in the paper's Table 1, the temperature of its published code."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Options(transformer_draws.Options):
    """Options of `generate`, all traced."""

    shares: Array  # f32[T], from `shares`
    steps: Array  # i32[]
    choice_temperature: Array  # f32[]


def shares(steps: int, length: int) -> np.ndarray:
    """gamma(s / steps) f32[length], what share of the tokens is masked after step s = 1, ..., steps; then zeros."""
    r = np.arange(1, length + 1) / steps
    return np.where(r < 1.0, np.cos(0.5 * math.pi * np.minimum(r, 1.0)), 0.0).astype(np.float32)


def still_masked(count: Array, share: Array) -> Array:
    """How many of `count` i32[n] tokens are masked after a step."""
    return jnp.floor(count.astype(jnp.float32) * share).astype(jnp.int32)


@dataclass(frozen=True, kw_only=True)
class MaskGIT:
    """A row of `transformer.DECODINGS`."""

    network: Masked
    tokens: TokenSpec

    reads = (*transformer_draws.READS, "steps", "choice_temperature")

    def __post_init__(self) -> None:
        if not isinstance(self.network, Masked):
            raise ValueError("needs a network of masked tokens, such as maskgit")

    @property
    def mask(self) -> int:
        """The token that stands for none."""
        return self.tokens.vocabulary

    # ------------------------------------------------------------------------------------------ training

    def losses(
        self, params: Tree, tokens: Array, label: Array | None, keys: Array, dropout: Array, smoothing: float
    ) -> tuple[Array, Metrics]:
        """Nats f32[B] of the hidden ones of tokens i32[B,T]: their sum (eq. 2) over the mean number of hidden tokens.

        That number is T times the integral of gamma, 2 / pi: the same for all, so that no example's weight depends on
        the batch it stands in.
        """
        hidden = self.hidden(keys)
        logits = self.network.apply(params, jnp.where(hidden, self.mask, tokens), label, dropout)
        nats = jnp.where(hidden, cross_entropy(logits, tokens, smoothing), 0.0)
        return jnp.sum(nats, axis=1) / (self.tokens.length * 2.0 / math.pi), {}

    def hidden(self, keys: Array) -> Array:
        """bool[B,T]: ceil(gamma(r) T) places, each set of so many as likely as any other."""
        T = self.tokens.length
        count = jnp.ceil(jnp.cos(0.5 * math.pi * rng.uniform(rng.fold(keys, 0))) * T)
        order = rng.draw(rng.fold(keys, 1), lambda key: jax.random.permutation(key, T))
        return order < count.astype(jnp.int32)[:, None]

    # ------------------------------------------------------------------------------------------ sampling

    def options(self, steps: int, choice_temperature: float, **shared: Array) -> Options:
        """Options of `generate`; 0 steps and a choice temperature of -1 are those at the top of this file.

        Raises:
          UserError: for more steps than there are tokens.
        """
        T = self.tokens.length
        require(steps <= T, "sample.steps", steps, f"must be at most {T}, the number of tokens")
        steps = steps or min(STEPS, T)
        return Options(
            shares=jnp.asarray(shares(steps, T)),
            steps=jnp.int32(steps),
            choice_temperature=jnp.float32(CHOICE_TEMPERATURE if choice_temperature == -1.0 else choice_temperature),
            **shared,
        )

    def generate(self, params: Tree, keys: Array, shown: Shown, options: Options) -> Array:
        """Tokens i32[n,T], one sequence for each of keys key[n]."""
        return self.filled(params, jnp.full((len(keys), self.tokens.length), self.mask), keys, shown, options)

    def filled(self, params: Tree, tokens: Array, keys: Array, shown: Shown, options: Options) -> Array:
        """Tokens i32[n,T] with something in the place of each mask."""
        count = jnp.sum(tokens == self.mask, axis=1)

        def step(s: Array, tokens: Array) -> Array:
            masked, own = tokens == self.mask, rng.fold(keys, s)
            logits = shown.merged(self.network.apply(params, shown.repeated(tokens), shown.label, None))
            tokens = jnp.where(masked, draw(rng.fold(own, 0), logits, options), tokens)
            # A token is kept by its log-probability and Gumbel noise, less and less of it: never the same choice twice.
            left = 1.0 - (s + 1).astype(jnp.float32) / options.steps.astype(jnp.float32)
            noise = rng.draw(rng.fold(own, 1), lambda key: jax.random.gumbel(key, tokens.shape[1:]))
            sure = options.choice_temperature * left * noise - cross_entropy(logits, tokens)
            again = ranks(jnp.where(masked, sure, jnp.inf)) < still_masked(count, options.shares[s])[:, None]
            return jnp.where(again, self.mask, tokens)

        return jax.lax.fori_loop(0, options.steps, step, tokens)

    def inpaint(self, params: Tree, tokens: Array, known: Array, keys: Array, shown: Shown, options: Options) -> Array:
        """Tokens i32[n,T], those that are not `known` bool[n,T] made anew (section 4.3)."""
        return self.filled(params, jnp.where(known, tokens, self.mask), keys, shown, options)

    # ------------------------------------------------------------------------------------------ what it costs

    def run(self, params: Tree, label: Array | None) -> Tree:
        """One run of the network: of all tokens of one image."""
        return self.network.apply(params, jnp.zeros((1, self.tokens.length), jnp.int32), label, None)

    def counted(self, note: Callable[[int], None]) -> "MaskGIT":
        """The same, whose network says at each of its runs how many images it was given."""

        def apply(params: Tree, tokens: Array, *others: Array | None) -> Array:
            jax.debug.callback(partial(note, len(tokens)))
            return self.network.apply(params, tokens, *others)

        return replace(self, network=replace(self.network, apply=apply))


def ranks(x: Array) -> Array:
    """i32[n,T], 0 for the least of each row of x f32[n,T]; of equals the first is the lesser."""
    return jnp.argsort(jnp.argsort(x, axis=1, stable=True), axis=1)
