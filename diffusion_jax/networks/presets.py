"""Networks of the papers by name: `"dit-xl/2"` in a config stands for the options beside it here.

A preset takes options like any other row, and they win: `"dit-xl/2(dropout=0.1)"`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from diffusion_jax import plugs
from diffusion_jax.types import ImageSpec, TokenSpec


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


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two networks that play against each other, and the images that they were published for.

    Attributes:
      generator: as a row of `gan.GENERATORS` with its options.
      discriminator: as a row of `gan.DISCRIMINATORS` with its options.
      image: size, channels and classes.
    """

    generator: str
    discriminator: str
    image: ImageSpec


@dataclass(frozen=True, kw_only=True)
class FirstStage:
    """A tokenizer, and the images that it was published for.

    Attributes:
      codec: as a row of `tokenizer.CODECS` with its options.
      bottleneck: as a row of `tokenizers.bottlenecks.BOTTLENECKS` with its options.
      image: size and channels.
    """

    codec: str
    bottleneck: str
    image: ImageSpec


@dataclass(frozen=True, kw_only=True)
class Transformer:
    """A network over tokens, and the tokens that it was published for.

    Attributes:
      text: the network, as a row of `sequence.NETWORKS` with its options.
      tokens: grid, vocabulary and classes.
    """

    text: str
    tokens: TokenSpec


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


def _adm() -> dict[str, Preset]:
    """Flags of the READMEs of openai/improved-diffusion (CIFAR-10) and openai/guided-diffusion; EDM's of NVlabs/edm."""
    iddpm = "channels=128,multipliers=(1,2,2,2),attention=(16,8),heads=4,resblock_updown=False,dropout=0.3"
    wide = "channels=256,blocks=2,dropout=0.0"
    texts = {
        64: "adm",
        128: f"adm({wide},multipliers=(1,1,2,3,4),heads=4)",  # the one whose README has heads, not channels a head
        256: f"adm({wide},multipliers=(1,1,2,2,4,4))",
        512: f"adm({wide},multipliers=(0.5,1,1,2,2,4,4))",
    }
    return {
        "iddpm-cifar10": Preset(text=f"adm({iddpm})", image=_pixels(32), channels_out=6),
        **{f"adm-{size}": Preset(text=text, image=_pixels(size, 1000), channels_out=6) for size, text in texts.items()},
        "edm-imagenet64": Preset(text="adm(time_scale=1.0)", image=_pixels(64, 1000), channels_out=3),
    }


def _edm() -> dict[str, Preset]:
    """Training options in the README of NVlabs/edm; the networks of images by Karras et al. 2022 but for ImageNet's."""
    ncsnpp = "embedding='fourier',noise_multiplier=2,encoder='residual',resample=(1,3,3,1)"
    return {
        "edm-cifar10": Preset(text="ddpmpp(augment=9)", image=_pixels(32, 10), channels_out=3),
        "ncsnpp-cifar10": Preset(text=f"ddpmpp(augment=9,{ncsnpp})", image=_pixels(32, 10), channels_out=3),
        "edm-ffhq64": Preset(
            text="ddpmpp(multipliers=(1,2,2,2),dropout=0.05,augment=9)", image=_pixels(64), channels_out=3
        ),
    }


def _edm2() -> dict[str, Preset]:
    """Karras et al. 2024, ImageNet-512 in latents: "edm2-img512-..." of NVlabs/edm2, train_edm2.py."""
    sizes = {
        "xs": "channels=128",
        "s": "channels=192",
        "m": "channels=256,dropout=0.1",
        "l": "channels=320,dropout=0.1",
        "xl": "channels=384,dropout=0.1",
        "xxl": "channels=448,dropout=0.1",
    }
    return {
        f"edm2-{size}": Preset(text=f"edm2({options})", image=_latents(64), channels_out=4)
        for size, options in sizes.items()
    }


def _uvit() -> dict[str, Preset]:
    """Configs of baofff/U-ViT; its models of ImageNet-64 know no missing label. See Bao et al. 2023, Table 2."""
    medium, large = "width=768,depth=16,heads=12", "width=1024,depth=20,heads=16"
    huge = "width=1152,depth=28,heads=16,convolution=False"
    rows = {
        "uvit-s/2": ("patch=2", _pixels(32)),
        "uvit-s/4": ("patch=4", _pixels(64)),
        "uvit-m/4": (f"patch=4,null_label=False,{medium}", _pixels(64, 1000)),
        "uvit-l/4": (f"patch=4,null_label=False,{large}", _pixels(64, 1000)),
        "uvit-l/2": (f"patch=2,{large}", _latents()),
        "uvit-h/2": (f"patch=2,{huge}", _latents()),
    }
    return {
        name: Preset(text=f"uvit({options})", image=image, channels_out=image.channels)
        for name, (options, image) in rows.items()
    }


PRESETS = {
    **_dit(),
    **_uvit(),
    # Ho et al. 2020, appendix B
    "ddpm-cifar10": Preset(text="unet", image=_pixels(32), channels_out=3),
    "ddpm-256": Preset(text="unet(multipliers=(1,1,2,2,4,4),dropout=0.0)", image=_pixels(256), channels_out=3),
    **_adm(),
    **_edm(),
    **_edm2(),
    # Kingma et al. 2021: google-research/vdm, configs/cifar10.py
    "vdm-cifar10": Preset(text="vdm", image=_pixels(32), channels_out=3),
}


def _r3gan(channels: int, base: int, group: int, image: ImageSpec) -> Pair:
    """Huang et al. 2024: presets of brownvc/R3GAN, train.py."""
    options = f"channels_max={channels},channels_base={base},group={group}"
    return Pair(generator=f"r3gan({options})", discriminator=f"r3gan({options})", image=image)


PAIRS = {
    # Karras et al. 2020, configuration F; at 256 pixels with half the channels, as "paper256" of stylegan2-ada-pytorch
    "stylegan2-256": Pair(
        generator="stylegan2(channels_base=16384)",
        discriminator="stylegan2(channels_base=16384,group=8)",
        image=_pixels(256),
    ),
    "stylegan2-1024": Pair(generator="stylegan2", discriminator="stylegan2", image=_pixels(1024)),
    "r3gan-cifar10": _r3gan(768, 24576, 16, _pixels(32, 10)),
    "r3gan-ffhq64": _r3gan(768, 24576, 16, _pixels(64)),
    "r3gan-ffhq256": _r3gan(768, 24576, 16, _pixels(256)),
    "r3gan-imagenet32": _r3gan(1536, 49152, 32, _pixels(32, 1000)),
    "r3gan-imagenet64": _r3gan(1536, 98304, 32, _pixels(64, 1000)),
}


def _kl(options: str, latents: int) -> FirstStage:
    """Rombach et al. 2022, Table 8: configs of CompVis/latent-diffusion, models/first_stage_models."""
    return FirstStage(codec=f"vqgan({options})", bottleneck=f"kl(latents={latents})", image=_pixels(256))


def _vqgan(codes: int) -> FirstStage:
    """Esser et al. 2021: configs of the models of ImageNet in the README of CompVis/taming-transformers."""
    codec = "vqgan(multipliers=(1,1,2,2,4),attention=(16,))"
    return FirstStage(codec=codec, bottleneck=f"vq(codes={codes},latents=256)", image=_pixels(256))


FIRST_STAGES = {
    "kl-f4": _kl("multipliers=(1,2,4)", 3),
    "kl-f8": _kl("multipliers=(1,2,4,4)", 4),
    "kl-f16": _kl("multipliers=(1,1,2,2,4),attention=(16,)", 16),
    "kl-f32": _kl("multipliers=(1,1,2,2,4,4),attention=(16,8)", 64),
    # Esser et al. 2024, section 5.2.1: 16 channels, and no 1x1 convolutions; Flux's is of the same shape
    "kl-f8-16": _kl("multipliers=(1,2,4,4),projection=False", 16),
    "vqgan-f16-1024": _vqgan(1024),
    "vqgan-f16-16384": _vqgan(16384),
    # Chang et al. 2022: google-research/maskgit
    "maskgit-vqgan": FirstStage(codec="maskgit", bottleneck="vq(codes=1024,latents=256)", image=_pixels(256)),
}


def _codes(vocabulary: int, channels: int) -> TokenSpec:
    """ImageNet at 256 pixels under an autoencoder that makes 16 pixels one place."""
    return TokenSpec(grid=(16, 16, 1), vocabulary=vocabulary, channels=channels, num_classes=1000)


def _llamagen() -> dict[str, Transformer]:
    """Sun et al. 2024, Table 1: GPT_B, ..., GPT_3B of FoundationVision/LlamaGen."""
    sizes = {
        "b": "width=768,depth=12,heads=12",
        "l": "width=1024,depth=24,heads=16",
        "xl": "width=1280,depth=36,heads=20",
        "xxl": "width=1536,depth=48,heads=24",
        "3b": "width=3200,depth=24,heads=32",
    }
    return {
        f"llamagen-{size}": Transformer(text=f"gpt({options})", tokens=_codes(16384, 8))
        for size, options in sizes.items()
    }


def _var() -> dict[str, Transformer]:
    """Tian et al. 2024, section 4.1: width = 64 depth, as many heads as blocks."""
    tokens = replace(_codes(4096, 32), scales=(1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
    return {
        f"var-d{depth}": Transformer(text=f"var(width={64 * depth},depth={depth},heads={depth})", tokens=tokens)
        for depth in (16, 20, 24, 30)
    }


def _mar() -> dict[str, Transformer]:
    """Li et al. 2024, section 5: mar_base, mar_large and mar_huge, with the MLPs of the README of LTH14/mar."""
    sizes = {
        "b": "width=768,depth=12,heads=12,mlp_width=1024,mlp_depth=6",
        "l": "width=1024,depth=16,heads=16,mlp_width=1280,mlp_depth=8",
        "h": "width=1280,depth=20,heads=16,mlp_width=1536,mlp_depth=12",
    }
    return {f"mar-{size}": Transformer(text=f"mar({options})", tokens=_codes(0, 16)) for size, options in sizes.items()}


SEQUENCES = {
    **_llamagen(),
    # Chang et al. 2022: google-research/maskgit
    "maskgit-256": Transformer(text="maskgit(null_label=False)", tokens=_codes(1024, 256)),
    **_var(),
    **_mar(),
}

TEXTS = {name: preset.text for name, preset in PRESETS.items()}
GENERATOR_TEXTS = {name: pair.generator for name, pair in PAIRS.items()}
DISCRIMINATOR_TEXTS = {name: pair.discriminator for name, pair in PAIRS.items()}
CODEC_TEXTS = {name: stage.codec for name, stage in FIRST_STAGES.items()}
BOTTLENECK_TEXTS = {name: stage.bottleneck for name, stage in FIRST_STAGES.items()}

SEQUENCE_TEXTS = {name: preset.text for name, preset in SEQUENCES.items()}


def expand(field: str, text: str, texts: Mapping[str, str] = TEXTS) -> tuple[str, dict[str, Any]]:
    """(row of a table of networks, its options) that `text` names, be it a key of `texts` or a row itself."""
    name, options = plugs.parse(field, text)
    if name not in texts:
        return name, options
    name, preset = plugs.parse(field, texts[name])
    return name, preset | options
