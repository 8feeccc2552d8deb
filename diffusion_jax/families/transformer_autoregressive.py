"""Token after token, each given those before it: the likelihood is exact, and generation keeps keys and values.

log p(tokens) = sum_t log p(token_t | token_0, ..., token_(t-1))
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp

from diffusion_jax import rng
from diffusion_jax.families import transformer_draws
from diffusion_jax.families.transformer_draws import Options, Shown, cross_entropy, draw
from diffusion_jax.networks.sequence import Causal
from diffusion_jax.types import Array, Metrics, TokenSpec, Tree


@dataclass(frozen=True, kw_only=True)
class Autoregressive:
    """A row of `transformer.DECODINGS`."""

    network: Causal
    tokens: TokenSpec

    reads = transformer_draws.READS

    def __post_init__(self) -> None:
        if not isinstance(self.network, Causal):
            raise ValueError("needs a causal network, such as gpt")

    def losses(
        self, params: Tree, tokens: Array, label: Array | None, keys: Array, dropout: Array, smoothing: float
    ) -> tuple[Array, Metrics]:
        """Nats a token f32[B] of tokens i32[B,T], smoothed, and how many bits it is without that."""
        logits = self.network.apply(params, tokens, label, dropout)
        bits = jnp.mean(cross_entropy(logits, tokens)) / jnp.log(2.0)
        return jnp.mean(cross_entropy(logits, tokens, smoothing), axis=1), {"bits_per_token": bits}

    def nats(self, params: Tree, tokens: Array, label: Array | None) -> Array:
        """-log p(tokens) f32[B] of tokens i32[B,T]."""
        return jnp.sum(cross_entropy(self.network.apply(params, tokens, label, None), tokens), axis=1)

    def options(self, **shared: Array) -> Options:
        """Options of `generate`."""
        return Options(**shared)

    def generate(self, params: Tree, keys: Array, shown: Shown, options: Options) -> Array:
        """Tokens i32[n,T], one sequence for each of keys key[n]: one scan over the T places."""

        def step(carry: tuple, t: Array) -> tuple[tuple, Array]:
            token, cache = carry
            logits, cache = self.network.step(params, shown.repeated(token), shown.label, cache)
            token = draw(rng.fold(keys, t), shown.merged(logits), options)
            return (token, cache), token

        begin = jnp.zeros(len(keys), jnp.int32), self.network.begin(shown.copies * len(keys))
        _, tokens = jax.lax.scan(step, begin, jnp.arange(self.tokens.length))
        return tokens.T

    # ------------------------------------------------------------------------------------------ what it costs

    def run(self, params: Tree, label: Array | None) -> Tree:
        """One run of the network: the step of one token of one image."""
        return self.network.step(params, jnp.zeros(1, jnp.int32), label, self.network.begin(1))

    def counted(self, note: Callable[[int], None]) -> "Autoregressive":
        """The same, whose network says at each of its runs how many images it was given."""

        def step(params: Tree, token: Array, *others: Tree) -> tuple[Array, Tree]:
            jax.debug.callback(partial(note, len(token)))
            return self.network.step(params, token, *others)

        return replace(self, network=replace(self.network, step=step))
