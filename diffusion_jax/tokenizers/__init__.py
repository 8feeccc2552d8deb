"""Tokenizers: a frozen way from images to a grid of tokens or latents, and back. Families above see nothing else."""

from diffusion_jax import plugs
from diffusion_jax.errors import require
from diffusion_jax.tokenizers import patches, pixels, pyramid
from diffusion_jax.tokenizers.base import Tokenizer
from diffusion_jax.tokenizers.scales import Scales
from diffusion_jax.tokenizers.stage import Stage
from diffusion_jax.types import ImageSpec

TOKENIZERS = {"patches": patches.build, "pixels": pixels.build, "pyramid": pyramid.build}
"""name -> builder (options, spec) of a tokenizer that needs no training."""


TRAINED = "workdir:"
"""What stands before the workdir of a run that trained one."""


def build(field: str, text: str, spec: ImageSpec, trained: Tokenizer | None = None) -> Tokenizer:
    """The tokenizer that `text` names, for images of `spec`.

    Args:
      field: the config's, for errors.
      text: from `TOKENIZERS`, or "workdir:PATH".
      spec: what the images look like.
      trained: what was found in PATH, whose reading is the command's affair.

    Raises:
      UserError: naming `field`, for an unknown name or option, or a path where nothing was found.
    """
    if text.startswith(TRAINED):
        require(trained is not None, field, text, "names a run, which nobody has opened")
        return trained
    return plugs.build(field, text, TOKENIZERS, spec=spec)


__all__ = ["TOKENIZERS", "Scales", "Stage", "Tokenizer", "build"]
