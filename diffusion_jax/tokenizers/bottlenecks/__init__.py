"""Bottlenecks: what makes of an encoder's numbers a few that can be modelled. Pure functions, one table."""

from typing import Any

from diffusion_jax import plugs
from diffusion_jax.errors import require
from diffusion_jax.networks import presets
from diffusion_jax.tokenizers.bottlenecks.base import Bottleneck
from diffusion_jax.tokenizers.bottlenecks.fsq import FSQ
from diffusion_jax.tokenizers.bottlenecks.kl import KL
from diffusion_jax.tokenizers.bottlenecks.lfq import LFQ
from diffusion_jax.tokenizers.bottlenecks.residual import Residual
from diffusion_jax.tokenizers.bottlenecks.vq import VQ

BOTTLENECKS = {"fsq": FSQ, "kl": KL, "lfq": LFQ, "residual": Residual, "vq": VQ}
"""name -> `Bottleneck`, built of its options, and of the image's `dimensions` where it reads them."""

OF_TRAINING = frozenset({"dimensions", "weight", "beta", "temperature", "joint", "codebook", "revive"})
"""Options of the rows, and what they are built of, that no code or latent depends on once the parameters are fixed."""


def build(field: str, text: str, dimensions: int) -> Bottleneck:
    """The bottleneck that `text` names, be it a row of `BOTTLENECKS` or a preset.

    Args:
      field: the config field, for error messages.
      text: such as `"vq(codes=512,codebook='ema')"` or `"kl-f8"`.
      dimensions: numbers in an image.

    Raises:
      UserError: for an unknown name or option.
    """
    name, given = presets.expand(field, text, presets.BOTTLENECK_TEXTS)
    known = {**BOTTLENECKS, **presets.BOTTLENECK_TEXTS}
    require(name in BOTTLENECKS, field, text, f"there is no {name!r}; {plugs.suggest(name, known)}")
    return plugs.call(field, BOTTLENECKS[name], given, label=name, dimensions=dimensions)


def function_of(bottleneck: Bottleneck) -> dict[str, Any]:
    """What, with its parameters, says which codes or latents it makes: its row, and all options but `OF_TRAINING`."""
    options = {name: value for name, value in vars(bottleneck).items() if name not in OF_TRAINING}
    return {"bottleneck": type(bottleneck).__name__, **options}
