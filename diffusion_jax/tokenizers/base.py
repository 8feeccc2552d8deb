"""What every tokenizer is to those that use it."""

from collections.abc import Callable
from dataclasses import dataclass

from diffusion_jax.tokenizers.scales import Scales
from diffusion_jax.types import Array, Tree


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """A frozen way from images to a grid and back: by discrete tokens, or by the vectors that they stand for.

    Attributes:
      grid: (h, w, d), d tokens a place: 1 for codes, C for pixels of C channels.
      vocabulary: number of different tokens; 0 where there are latents instead.
      channels: of a latent or of a code's vector; 0 for pixels, which are what their tokens say, exactly.
      encode: (params, images f32[B,H,W,C], keys key[B] or None) -> tokens i32[B,*shape], or latents
        f32[B,h,w,channels]; latents are drawn by keys, and without keys their means.
      decode: (params, tokens or latents) -> images f32[B,H,W,C] in [-1, 1].
      vectors: (params, images, keys or None) -> f32[B,h,w,width]: latents, the codes' vectors, or the pixels.
      of_vectors: (params, any vectors f32[B,h,w,width]) -> images f32[B,H,W,C] in [-1, 1].
      scales: of tokens of several scales, what they amount to; None for those of one grid.
      exact: whether tokens lose nothing of images on the data's grey levels.
      player: whose parameters `params` are, in the family that trains it; "" where there are none.
    """

    grid: tuple[int, int, int]
    vocabulary: int
    channels: int
    encode: Callable[[Tree, Array, Array | None], Array]
    decode: Callable[[Tree, Array], Array]
    vectors: Callable[[Tree, Array, Array | None], Array]
    of_vectors: Callable[[Tree, Array], Array]
    scales: Scales | None = None
    exact: bool = False
    player: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of an image's tokens: the grid, or (L,) for those of all scales."""
        return (self.scales.length,) if self.scales else self.grid

    @property
    def width(self) -> int:
        """Numbers in a place's vector."""
        return self.channels or self.grid[2]
