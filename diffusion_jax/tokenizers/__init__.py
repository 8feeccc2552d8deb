"""Tokenizers: a frozen way from images to a grid of tokens or latents, and back. Families above see nothing else."""

from diffusion_jax import plugs
from diffusion_jax.tokenizers import pixels
from diffusion_jax.tokenizers.base import Tokenizer
from diffusion_jax.types import ImageSpec

TOKENIZERS = {"pixels": pixels.build}
"""name -> builder (options, spec) of a tokenizer that needs no training."""


def build(field: str, text: str, spec: ImageSpec) -> Tokenizer:
    """The tokenizer that `text` names, for images of `spec`.

    Raises:
      UserError: naming `field`, for an unknown name or option.
    """
    return plugs.build(field, text, TOKENIZERS, spec=spec)


__all__ = ["TOKENIZERS", "Tokenizer", "build"]
