"""What every tokenizer is to those that use it."""

from collections.abc import Callable
from dataclasses import dataclass

from diffusion_jax.types import Array, Tree


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """A frozen way from images to a grid and back: discrete tokens, or latents that are continuous.

    Attributes:
      grid: (h, w, d), d tokens a place: 1 for codes, C for pixels of C channels.
      vocabulary: number of different tokens; 0 where there are latents instead.
      channels: of a latent or of a code's vector; 0 for pixels, which are what their tokens say, exactly.
      encode: (params, images f32[B,H,W,C], keys key[B]) -> tokens i32[B,h,w,d], or latents f32[B,h,w,channels]. `keys`
        are for those that draw their latents.
      decode: (params, tokens or latents) -> images f32[B,H,W,C] in [-1, 1].
    """

    grid: tuple[int, int, int]
    vocabulary: int
    channels: int
    encode: Callable[[Tree, Array, Array], Array]
    decode: Callable[[Tree, Array], Array]
