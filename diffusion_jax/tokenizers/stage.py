"""How a family reads what it models: tokens or standardised vectors, of images or of what was encoded beforehand."""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from diffusion_jax.tokenizers.base import Tokenizer
from diffusion_jax.types import Array, Batch, FirstStage, Tree


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A tokenizer, seen by its tokens or by its vectors.

    `frozen` holds, as `tokenizer`, the parameters of one that was trained: see `FirstStage`.
    """

    tokenizer: Tokenizer
    by_vectors: bool

    @property
    def measured(self) -> bool:
        """Whether vectors are standardised: those of a trained tokenizer have any scale, pixels lie in [-1, 1]."""
        return self.by_vectors and bool(self.tokenizer.player)

    def read(self, frozen: Mapping[str, Tree], batch: Batch) -> Array:
        """What the family models of a batch: tokens i32[B,...], or vectors f32[B,h,w,width], standardised."""
        given = batch["encoded"] if "encoded" in batch else self.encode(frozen, batch["image"])
        return self.standardised(frozen, given)

    def encode(self, frozen: Mapping[str, Tree], images: Array) -> Array:
        """The tokens or vectors of images f32[B,H,W,C], as the tokenizer gives them; means where it draws them."""
        read = self.tokenizer.vectors if self.by_vectors else self.tokenizer.encode
        return jax.lax.stop_gradient(read(params_of(frozen), images, None))

    def decode(self, frozen: Mapping[str, Tree], given: Array) -> Array:
        """The images f32[B,H,W,C] in [-1, 1] of what `read` gives."""
        if not self.by_vectors:
            return self.tokenizer.decode(params_of(frozen), given)
        if self.measured:
            given = given / over_last(frozen["tokenizer"]["scale"], given) + over_last(
                frozen["tokenizer"]["shift"], given
            )
        return self.tokenizer.of_vectors(params_of(frozen), given)

    def standardised(self, frozen: Mapping[str, Tree], given: Array) -> Array:
        """(given - shift) * scale, where these were measured."""
        if not self.measured:
            return given
        own = frozen["tokenizer"]
        return (given - over_last(own["shift"], given)) * over_last(own["scale"], given)

    def first_stage(self, shape: tuple[int, ...]) -> FirstStage | None:
        """For the family's `first_stage`, where the tokenizer was trained; `shape` is that of an image's code."""
        if not self.tokenizer.player:
            return None
        dtype = jnp.float32 if self.by_vectors else jnp.int32
        return FirstStage(shape=shape, dtype=dtype, measured=self.measured, encode=self.encode, decode=self.decode)


def params_of(frozen: Mapping[str, Tree]) -> Tree:
    """The tokenizer's parameters; empty for one without."""
    return frozen["tokenizer"]["params"] if "tokenizer" in frozen else {}


def over_last(x: Array, like: Array) -> Array:
    """x f[channels] as an array of `like`'s rank."""
    return x.reshape((1,) * (like.ndim - 1) + (-1,))
