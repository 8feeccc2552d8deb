"""Networks of the papers by name: `"dit-xl/2"` in a config stands for the options beside it here.

A preset takes options like any other row, and they win: `"dit-xl/2(dropout=0.1)"`.
"""

from dataclasses import dataclass
from typing import Any

from diffusion_jax import plugs
from diffusion_jax.types import ImageSpec


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A network, and the images that it was published for: its published count of parameters is for those.

    Attributes:
      text: the network, as a row of `networks.BACKBONES` with its options.
      image: size, channels and classes.
      channels_out: twice the image's channels where the network learns the variance, too.
    """

    text: str
    image: ImageSpec
    channels_out: int


def _latents(size: int = 32, num_classes: int = 1000) -> ImageSpec:
    """Latents of ImageNet under an autoencoder that makes 8 pixels one."""
    return ImageSpec(size=size, channels=4, num_classes=num_classes)


def _pixels(size: int, num_classes: int = 0) -> ImageSpec:
    return ImageSpec(size=size, channels=3, num_classes=num_classes)


def _dit() -> dict[str, Preset]:
    """Peebles & Xie 2022, Table 1."""
    sizes = {
        "s": "width=384,depth=12,heads=6",
        "b": "width=768,depth=12,heads=12",
        "l": "width=1024,depth=24,heads=16",
        "xl": "width=1152,depth=28,heads=16",
    }
    return {
        f"dit-{size}/{patch}": Preset(text=f"dit(patch={patch},{options})", image=_latents(), channels_out=8)
        for size, options in sizes.items()
        for patch in (2, 4, 8)
    }


PRESETS = {
    **_dit(),
    # Ho et al. 2020, appendix B
    "ddpm-cifar10": Preset(text="unet", image=_pixels(32), channels_out=3),
}


def expand(field: str, text: str) -> tuple[str, dict[str, Any]]:
    """(row of `networks.BACKBONES`, its options) that `text` names, be it a preset or a row itself."""
    name, options = plugs.parse(field, text)
    if name not in PRESETS:
        return name, options
    name, preset = plugs.parse(field, PRESETS[name].text)
    return name, preset | options
