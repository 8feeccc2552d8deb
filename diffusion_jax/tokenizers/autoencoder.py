"""The tokenizer that is trained: encoder, bottleneck, decoder.

    image -> encoder -> y -> bottleneck -> tokens or latents -> z -> decoder -> image

In training z follows from y at once, and gradients reach the encoder through it.
"""

import math
from dataclasses import dataclass

import jax.numpy as jnp

from diffusion_jax import rng
from diffusion_jax.errors import require
from diffusion_jax.networks import tokenizer as networks
from diffusion_jax.tokenizers import bottlenecks
from diffusion_jax.tokenizers.base import Tokenizer
from diffusion_jax.tokenizers.bottlenecks.base import Bottleneck, Passed
from diffusion_jax.tokenizers.bottlenecks.residual import Residual
from diffusion_jax.tokenizers.scales import Scales
from diffusion_jax.types import Array, ImageSpec, Tree


@dataclass(frozen=True, kw_only=True)
class Autoencoder:
    """The two networks and what stands between them; one tree of parameters holds all three."""

    codec: networks.Codec
    bottleneck: Bottleneck

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w)."""
        return self.codec.grid

    @property
    def scales(self) -> Scales | None:
        """What codes of several scales amount to; None where there is one."""
        return self.bottleneck.multiscale if isinstance(self.bottleneck, Residual) else None

    @property
    def places(self) -> tuple[int, ...]:
        """Shape of an image's codes: the grid's, or (L,) of all scales."""
        return (self.scales.length,) if self.scales else self.grid

    @property
    def vocabulary(self) -> int:
        """Number of codes; 0 where there are latents instead."""
        return math.prod(self.bottleneck.digits) if self.bottleneck.digits else 0

    def init(self, key: Array) -> tuple[Tree, Tree]:
        """(Parameters, what changes without gradient)."""
        params, extra = self.bottleneck.init(rng.stream(key, "bottleneck"))
        return self.codec.init(key) | params, extra

    def train(self, params: Tree, extra: Tree, images: Array, keys: Array, step: Array) -> tuple[Array, Passed]:
        """The reconstruction f32[B,H,W,C], not kept in [-1, 1], of images f32[B,H,W,C]; and what the bottleneck says.

        See `Bottleneck.train` for `extra`, `keys` and `step`.
        """
        passed = self.bottleneck.train(params, extra, self.codec.encode(params, images), keys, step)
        return self.codec.decode(params, passed.z), passed

    def encode(self, params: Tree, images: Array, keys: Array | None) -> Array:
        """Tokens i32[B,*places] or latents f32[B,h,w,latents] of images f32[B,H,W,C]; means where there are no keys."""
        return self.bottleneck.encode(params, self.codec.encode(params, images), keys)

    def decode(self, params: Tree, given: Array) -> Array:
        """Images f32[B,H,W,C] in [-1, 1] of what `encode` returns."""
        return jnp.clip(self.codec.decode(params, self.bottleneck.decode(params, given)), -1.0, 1.0)

    def tokenizer(self, player: str) -> Tokenizer:
        """The same as families above it see it, once it is trained as the parameters of `player`."""
        shape = self.places if self.scales else (*self.grid, 1)

        def encode(params: Tree, images: Array, keys: Array | None) -> Array:
            given = self.encode(params, images, keys)
            return given.reshape(len(given), *shape) if self.vocabulary else given

        def decode(params: Tree, given: Array) -> Array:
            return self.decode(params, given.reshape(len(given), *self.places) if self.vocabulary else given)

        def vectors(params: Tree, images: Array, keys: Array | None) -> Array:
            return self.bottleneck.decode(params, self.encode(params, images, keys))

        def of_vectors(params: Tree, z: Array) -> Array:
            return jnp.clip(self.codec.decode(params, self.bottleneck.nearest(params, z)), -1.0, 1.0)

        return Tokenizer(
            grid=(*self.grid, 1),
            vocabulary=self.vocabulary,
            channels=self.bottleneck.latents,
            encode=encode,
            decode=decode,
            vectors=vectors,
            of_vectors=of_vectors,
            scales=self.scales,
            player=player,
        )


def build(network: str, bottleneck: str, spec: ImageSpec, precision: str) -> Autoencoder:
    """The autoencoder of a codec and a bottleneck, for images of `spec`.

    Args:
      network: from `networks.tokenizer.CODECS`, or a preset.
      bottleneck: from `bottlenecks.BOTTLENECKS`, or a preset.
      spec: of the images; labels are not looked at.
      precision: "float32" or "bfloat16", the arithmetic's.

    Raises:
      UserError: for an unknown name or option, or sizes that do not fit `spec`.
    """
    between = bottlenecks.build("family.bottleneck", bottleneck, math.prod(spec.shape))
    codec = networks.build("family.network", network, spec, precision, between.latents, between.outputs)
    it = Autoencoder(codec=codec, bottleneck=between)
    if it.scales:
        side = it.scales.sides[-1]
        rule = f"its last scale, {side}, must be the grid's side, {codec.grid[0]}"
        require(codec.grid == (side, side), "family.bottleneck", bottleneck, rule)
    return it
