"""Squares of pixels as latents: x of a place is its size^2 C numbers, row after row. Nothing is learned or lost."""

import jax.numpy as jnp

from diffusion_jax.tokenizers.base import Tokenizer
from diffusion_jax.types import Array, ImageSpec, Tree


def build(spec: ImageSpec, size: int = 2) -> Tokenizer:
    """Patches of `size` pixels a side, of images of `spec`; there are no parameters.

    Raises:
      ValueError: for a size that does not divide the images'.
    """
    if size < 1 or spec.size % size:
        raise ValueError(f"size must divide the images' {spec.size} pixels, and {size} does not")
    side, C = spec.size // size, spec.channels

    def encode(params: Tree, images: Array, keys: Array | None) -> Array:
        patches = images.reshape(-1, side, size, side, size, C)
        return jnp.swapaxes(patches, 2, 3).reshape(-1, side, side, size * size * C)

    def decode(params: Tree, latents: Array) -> Array:
        patches = jnp.swapaxes(latents.reshape(-1, side, side, size, size, C), 2, 3)
        return jnp.clip(patches.reshape(-1, *spec.shape), -1.0, 1.0)

    return Tokenizer(
        grid=(side, side, 1),
        vocabulary=0,
        channels=size * size * C,
        encode=encode,
        decode=decode,
        vectors=encode,
        of_vectors=decode,
    )
