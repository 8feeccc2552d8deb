"""Scale after scale, all tokens of one at once, given the coarser ones (VAR: Tian et al. 2024, section 3.1).

log p(r_1, ..., r_K) = sum_k log p(r_k | r_1, ..., r_(k-1))          eq. 4, the tokens of r_k independent of each other

The network is shown what the tokens before a scale amount to, at its size: see `tokenizers.scales`. Generation keeps
keys and values.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp

from diffusion_jax import rng, tokenizers
from diffusion_jax.families import transformer_draws
from diffusion_jax.families.transformer_draws import Shown, cross_entropy, draw
from diffusion_jax.networks import sequence
from diffusion_jax.types import Array, Metrics, TokenSpec, Tree

GUIDANCE_SCHEDULE = "linear"
"""Where nothing is said, as in the published code."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Options(transformer_draws.Options):
    """Options of `generate`, all traced."""

    guidance_grows: Array  # bool[]


@dataclass(frozen=True, kw_only=True)
class VAR:
    """A row of `transformer.DECODINGS`.

    Attributes:
      network: of logits.
      tokens: what they are.
      scales: what they amount to; `over` gives them the tokenizer's parameters.
    """

    network: sequence.Scales
    tokens: TokenSpec
    scales: tokenizers.Scales

    reads = (*transformer_draws.READS, "guidance_schedule")

    def __post_init__(self) -> None:
        if not isinstance(self.network, sequence.Scales):
            raise ValueError("needs a network of scales, such as var")

    def over(self, params: Tree) -> "VAR":
        """The same, with the tokenizer's parameters."""
        return replace(self, scales=self.scales.bound(params))

    def losses(
        self, params: Tree, tokens: Array, label: Array | None, keys: Array, dropout: Array, smoothing: float
    ) -> tuple[Array, Metrics]:
        """Nats a token f32[B] of tokens i32[B,L], smoothed, and how many bits it is without that."""
        logits = self.network.apply(params, self.scales.inputs(tokens), label, dropout)
        bits = jnp.mean(cross_entropy(logits, tokens)) / jnp.log(2.0)
        return jnp.mean(cross_entropy(logits, tokens, smoothing), axis=1), {"bits_per_token": bits}

    def nats(self, params: Tree, tokens: Array, label: Array | None) -> Array:
        """-log p(tokens) f32[B] of tokens i32[B,L]."""
        logits = self.network.apply(params, self.scales.inputs(tokens), label, None)
        return jnp.sum(cross_entropy(logits, tokens), axis=1)

    def options(self, guidance_schedule: str, **shared: Array) -> Options:
        """Options of `generate`; an empty schedule is the one at the top of this file."""
        return Options(guidance_grows=jnp.bool_((guidance_schedule or GUIDANCE_SCHEDULE) == "linear"), **shared)

    def generate(self, params: Tree, keys: Array, shown: Shown, options: Options) -> Array:
        """Tokens i32[n,L], one sequence for each of keys key[n], in a step a scale.

        Guidance's weight w may grow with the scales k = 1, ..., K: 1 + (w - 1) (k - 1) / (K - 1).
        """
        f_hat, cache = self.scales.begin(len(keys)), self.network.begin(shown.copies * len(keys))
        last, tokens = len(self.scales.sides) - 1, []
        for k in range(last + 1):
            inputs = shown.repeated(self.scales.shown(f_hat, k))
            logits, cache = self.network.step(params, inputs, shown.label, cache)
            guided = shown.grown(jnp.float32(k / last), options.guidance_grows)
            tokens.append(draw(rng.fold(keys, k), guided.merged(logits), options))
            f_hat = self.scales.added(f_hat, k, tokens[-1])
        return jnp.concatenate(tokens, axis=1)

    # ------------------------------------------------------------------------------------------ what it costs

    def run(self, params: Tree, label: Array | None) -> Tree:
        """One run of the network: of all scales of one image, which is what `generate` takes, scale by scale."""
        vectors = self.network.example[0]
        return self.network.apply(params, jnp.zeros(vectors.shape, vectors.dtype), label, None)

    def counted(self, note: Callable[[int], None]) -> "VAR":
        """The same, which says at the beginning of each run through all scales how many images it was given."""

        def begin(count: int) -> Tree:
            jax.debug.callback(partial(note, count))
            return self.network.begin(count)

        return replace(self, network=replace(self.network, begin=begin))
