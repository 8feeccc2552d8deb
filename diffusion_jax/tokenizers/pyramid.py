"""The trivial tokenizer of scales: what is left of the pixels, in grey steps, without parameters.

    f = level - the middle level,  in grey steps                    of an image of one channel
    r_k = round(area(f - f^, h_k))                                  the token is r_k + levels - 1
    f^ <- f^ + r_k                                                  each over the pixels of its cell

After scale k, f^ is the image's mean in each cell, rounded. The last scale is that of the pixels and leaves nothing:
the image follows from its tokens, of which there are 2 levels - 1 different ones, and the tokens follow from the image.
Most rows of tokens are those of no image, and `decode` gives an image all the same.
"""

import itertools
import math
from dataclasses import replace

import jax.numpy as jnp

from diffusion_jax.tokenizers import pixels
from diffusion_jax.tokenizers.base import Tokenizer
from diffusion_jax.tokenizers.scales import Scales, check
from diffusion_jax.types import Array, ImageSpec, Tree


def build(spec: ImageSpec, scales: tuple = ()) -> Tokenizer:
    """Grey steps of images of `spec`, which are of one channel; on the data's grey levels they come back to the bit.

    Args:
      spec: what the images look like.
      scales: side of each scale, from 1 to the image's, each a divisor of the next; empty for halves of the image's
        side, halves of these and so on, and 1.

    Raises:
      ValueError: for images of several channels, or other sides.
    """
    sides, top, step = scales or halves(spec.size), spec.levels - 1, unit(spec.levels)
    if spec.channels != 1:
        raise ValueError(f"is for images of one channel, and these have {spec.channels}")
    check(sides)
    if sides[-1] != spec.size or any(b % a for a, b in itertools.pairwise(sides)):
        raise ValueError(f"scales must each divide the next, up to the image's side {spec.size}, and {sides} do not")

    def token(params: Tree, r: Array) -> Array:
        return jnp.round(r[..., 0] / step).astype(jnp.int32) + top

    def vectors(params: Tree, tokens: Array, k: int) -> Array:
        r, times = (tokens - top).astype(jnp.float32) * step, spec.size // sides[k]
        return jnp.repeat(jnp.repeat(r, times, axis=1), times, axis=2)[..., None]

    plain, of = pixels.build(spec), Scales(sides=sides, channels=1, token=token, vectors=vectors)

    def encode(params: Tree, images: Array, keys: Array | None) -> Array:
        return of.encode((plain.encode(params, images, keys) - top // 2).astype(jnp.float32) * step)[0]

    def decode(params: Tree, tokens: Array) -> Array:
        level = jnp.round(of.stages(tokens)[-1] / step).astype(jnp.int32) + top // 2
        return plain.decode(params, jnp.clip(level, 0, top))

    return replace(plain, vocabulary=2 * top + 1, channels=1, encode=encode, decode=decode, scales=of)


def halves(size: int) -> tuple[int, ...]:
    """`size`, its half and so on as far as that is a whole number, and 1, from the least on."""
    sides = [size]
    while sides[0] % 2 == 0:
        sides.insert(0, sides[0] // 2)
    return tuple(sides if sides[0] == 1 else [1, *sides])


def unit(levels: int) -> float:
    """What a grey step is in f: |f| is at most 1. A power of 2, so that sums are exact."""
    return 2.0 ** -math.ceil(math.log2(levels // 2))
