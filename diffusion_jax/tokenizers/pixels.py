"""The trivial tokenizer: token k of 0, ..., levels - 1 is a grey level, -1 + 2 k / (levels - 1), of one channel.

Its vectors are the pixels themselves.
"""

import jax.numpy as jnp
import numpy as np

from diffusion_jax import grey
from diffusion_jax.tokenizers.base import Tokenizer
from diffusion_jax.types import Array, ImageSpec, Tree


def build(spec: ImageSpec) -> Tokenizer:
    """Grey levels of images of `spec`; there are no parameters, and images on those levels come back to the bit."""
    # In float32 as `data.source.to_float` computes it, so that the data's own values come back.
    greys = np.arange(spec.levels, dtype=np.float32) / np.float32((spec.levels - 1) / 2) - np.float32(1.0)

    def encode(params: Tree, images: Array, keys: Array | None) -> Array:
        """The nearest grey level."""
        return grey.index(images, spec.levels)

    def decode(params: Tree, tokens: Array) -> Array:
        return jnp.asarray(greys)[tokens]

    return Tokenizer(
        grid=spec.shape,
        vocabulary=spec.levels,
        channels=0,
        encode=encode,
        decode=decode,
        vectors=lambda params, images, keys: images,
        of_vectors=lambda params, pixels: jnp.clip(pixels, -1.0, 1.0),
        exact=True,
    )
