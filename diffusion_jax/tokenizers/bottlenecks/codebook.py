"""A learned codebook of K vectors e_k, and what keeps it in use; shared by the quantisers that have one.

    token = argmin_k |y - e_k|^2                                    van den Oord et al. 2017, eq. 1 and 2

The vectors follow a gradient, or with `codebook="ema"` each is the running mean of what was given that code (appendix
A.1):

    N_k <- gamma N_k + (1 - gamma) n_k,   m_k <- gamma m_k + (1 - gamma) sum_(token = k) y,   e_k = m_k / N_k

with N and m over a step's number of tokens, so that N_k is the share of `codes.Usage`.

A code that is hardly used is far from all that the encoder gives, and gradients do not bring it back. With `revive` it
begins anew, with the mean share 1 / K, at an output of the step's batch. Which one: each example draws a lot and a
place for each code, and the highest lot wins; so neither devices nor microbatches change it. No code is dead before it
had time to be used: in this all codes begin with the mean share, too.

The vector alone moves. The optimizer's moments of that row are those of the code that it was, until they are forgotten;
so is a part of the row in averaged weights (`train.ema`), where it lies between its old place and its new one. Both
pass as fast as the optimizer and the average forget.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from diffusion_jax import rng
from diffusion_jax.tokenizers.bottlenecks import codes
from diffusion_jax.types import Array, Tree

CODEBOOKS = ("gradient", "ema")
LEAST_SHARE = 1e-6
"""Over 1 / K: a code of a smaller share stays where it is."""


@dataclass(frozen=True, kw_only=True)
class Codebook:
    """See above: what quantisers with a codebook have in common.

    Attributes:
      codes: K.
      latents: numbers in a code's vector.
      beta: weight of the term that holds the encoder to its codes.
      codebook: what moves the vectors: "gradient", or "ema" for running means.
      revive: a code whose share is below this, over 1 / K, begins anew; 0 for none.
    """

    codes: int = 1024
    latents: int = 8
    beta: float = 0.25
    codebook: str = "gradient"
    revive: float = 0.0

    def __post_init__(self) -> None:
        if min(self.codes, self.latents) < 1:
            raise ValueError("codes and latents must be at least 1")
        if not self.beta >= 0.0:
            raise ValueError(f"beta must not be negative, and {self.beta} is")
        if self.codebook not in CODEBOOKS:
            raise ValueError(f"codebook must be one of {', '.join(CODEBOOKS)}, not {self.codebook!r}")
        if not 0.0 <= self.revive < 1.0:
            raise ValueError(f"revive must lie in [0, 1), not {self.revive}")

    @property
    def outputs(self) -> int:
        """See `Bottleneck`."""
        return self.latents

    @property
    def digits(self) -> tuple[int, ...]:
        """See `Bottleneck`: the code is its own."""
        return (self.codes,)

    def init(self, key: Array) -> tuple[Tree, Tree]:
        """See `Bottleneck`: vectors uniform within 1 / K around 0, as in CompVis/taming-transformers."""
        shape = (self.codes, self.latents)
        extra = {"usage": codes.begin(self.codes)}
        if self.codebook == "ema":
            extra |= {"running": jnp.zeros(shape), "sums": jnp.zeros(shape)}
        if self.revive:
            extra |= {"offers": jnp.zeros(shape), "lots": jnp.zeros(self.codes, jnp.uint32)}
        return {"codebook": jax.random.uniform(key, shape, minval=-1.0, maxval=1.0) / self.codes}, extra

    # ------------------------------------------------------------------------------------------ tokens and vectors

    def token(self, params: Tree, y: Array) -> Array:
        """The nearest codes i32[...] of y f32[...,latents]. |y|^2 is the same for all, and left out of the distance."""
        e, flat = params["codebook"], y.reshape(-1, self.latents)
        product = jnp.einsum("nd,kd->nk", flat, e, precision=jax.lax.Precision.HIGHEST)
        squared = jnp.sum(jnp.square(e), axis=1)[None]
        return jnp.argmin(squared - 2.0 * product, axis=-1).astype(jnp.int32).reshape(y.shape[:-1])

    def vector(self, params: Tree, token: Array) -> Array:
        """The vectors f32[...,latents] of codes i32[...]."""
        return params["codebook"][token]

    def settle(self, params: Tree, extra: Tree) -> Tree:
        """See `Bottleneck`: the vectors as running means and revival have them."""
        e, after = params["codebook"], self.advanced(extra)
        if self.codebook == "ema":
            N = after["usage"].shares[:, None]
            seen = LEAST_SHARE / self.codes < N  # below, the running means are about to be rounded to 0 on their own
            e = jnp.where(seen, after["running"] / jnp.where(seen, N, 1.0), e)
        elif self.revive:
            e = jnp.where(self.dead(extra)[:, None], extra["offers"], e)
        return params | {"codebook": e}

    # ------------------------------------------------------------------------------------------ what is remembered

    def begun(self, extra: Tree, step: Array) -> Tree:
        """`extra` at the beginning of `step`; as it is within the step."""
        new = step != extra["usage"].step
        return jax.tree.map(lambda after, now: jnp.where(new, after, now), self.advanced(extra), extra)

    def advanced(self, extra: Tree) -> Tree:
        """`extra` once its step is over: sums have joined the running means, and the dead have begun anew."""
        usage, dead = extra["usage"], self.dead(extra)
        ended = codes.ended(usage)
        after = {"usage": ended._replace(shares=jnp.where(dead, 1.0 / self.codes, ended.shares))}
        if self.codebook == "ema":
            running = codes.folded_in(usage, extra["running"], extra["sums"])
            if self.revive:
                running = jnp.where(dead[:, None], extra["offers"] / self.codes, running)
            after |= {"running": running, "sums": jnp.zeros_like(extra["sums"])}
        if self.revive:
            after |= {"offers": extra["offers"], "lots": jnp.zeros_like(extra["lots"])}
        return after

    def dead(self, extra: Tree) -> Array:
        """bool[K]: which codes begin anew once the step is over; none before there is a batch."""
        usage = extra["usage"]
        return (codes.since_uniform(usage) < self.revive / self.codes) & (jnp.sum(usage.counts) > 0.0)

    def remembered(self, extra: Tree, tokens: Array, y: Array, keys: Array, step: Array) -> Tree:
        """`extra` with a batch of `step` in it, of which the codes are i32[B,h,w], outputs y f32[B,h,w,latents]."""
        after = extra | {"usage": codes.counted(extra["usage"], step, tokens)}
        if self.codebook == "ema":
            sums = jnp.zeros_like(extra["sums"]).at[tokens.reshape(-1)].add(y.reshape(-1, self.latents))
            after["sums"] = extra["sums"] + sums
        if self.revive:
            offers, lots = self.offered(y, keys)
            higher = lots > extra["lots"]
            after["lots"] = jnp.where(higher, lots, extra["lots"])
            after["offers"] = jnp.where(higher[:, None], offers, extra["offers"])
        return after

    def offered(self, y: Array, keys: Array) -> tuple[Array, Array]:
        """(an output f32[K,latents], its lot u32[K]) for each code: the highest lot of the batch's examples."""
        places = y.reshape(len(y), -1, self.latents)
        draw = lambda n: rng.draw(rng.fold(keys, n), lambda key: jax.random.bits(key, (self.codes,), jnp.uint32))
        lots = draw(0)
        winner = jnp.argmax(lots, axis=0)
        place = jnp.take_along_axis(draw(1), winner[None], axis=0)[0] % places.shape[1]
        return places[winner, place.astype(jnp.int32)], jnp.max(lots, axis=0)
