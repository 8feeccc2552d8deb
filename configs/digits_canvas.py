"""Real digits scattered over 32x32 pixels: two stages, on two CPU cores.

First a tokenizer, which learns to write an image as 8x8 tokens; then a model of those, which is another family's:

    run() { diffusion-jax train --config=configs/digits_canvas.py:$1 --workdir=runs/canvas-$1; }
    run tokenizer; run transformer; run transformer-maskgit; run diffusion-latent
    run tokenizer-scales; run transformer-var
    run diffusion
    models=transformer,transformer-maskgit,transformer-var,diffusion-latent,diffusion
    diffusion-jax compare --out=runs/canvas --workdirs=runs/canvas-${models//,/,runs/canvas-}

The second ones find the first by its workdir; another is --config.family.tokenizer=workdir:PATH. `diffusion` needs no
tokenizer: it is the same model over pixels, for comparison. The class of a canvas is its largest digit.
"""

from ml_collections import ConfigDict

from diffusion_jax.cli.config import base

TOKENIZER, SCALES = "workdir:runs/canvas-tokenizer", "workdir:runs/canvas-tokenizer-scales"


def get_config(family: str = "") -> ConfigDict:
    """The config of `family`; what is set here is the same for all of them."""
    first = {"tokenizer": tokenizer, "tokenizer-scales": tokenizer_scales}
    second = {
        "transformer": transformer,
        "transformer-maskgit": transformer_maskgit,
        "transformer-var": transformer_var,
        "diffusion-latent": diffusion_latent,
        "diffusion": diffusion,
    }
    config = base(__file__, family, first | second)
    config.data.name = "digits_canvas"
    config.train.batch_size = 32
    config.train.learning_rate_schedule = "cosine_onecycle_schedule(pct_start=0.05)"
    config.train.ema.main = "warmup(decay=0.995)"
    config.checkpoint.every = 500
    return config


# ---------------------------------------------------------------------------------------------- stage one


def tokenizer(config: ConfigDict) -> None:
    """Finite scalar quantisation: 8x8 tokens of 4,375 values, no codebook to learn and none to collapse."""
    config.family.network = "maskgit(channels=8,multipliers=(1,3,8),blocks=1)"
    config.family.bottleneck = "fsq(levels=(7,5,5,5,5))"
    config.train.steps = 3000
    config.train.learning_rate = 3e-3


def tokenizer_scales(config: ConfigDict) -> None:
    """The same encoder and decoder around residual quantisation: 1 + 4 + 16 + 64 tokens, from coarse to fine.

    Codes are running means of what the encoder gives. A term that holds it to them (`beta`) would shrink its outputs to
    nothing before there are codes to speak of.
    """
    tokenizer(config)
    config.family.bottleneck = "residual(codes=1024,latents=4,scales=(1,2,4,8),codebook='ema',revive=0.1,beta=0.0)"


# ---------------------------------------------------------------------------------------------- stage two


def transformer(config: ConfigDict) -> None:
    """A GPT: token after token."""
    config.family.tokenizer = TOKENIZER
    config.family.network = "gpt(width=128,depth=4,heads=4,multiple_of=1)"
    config.train.steps = 4000
    config.train.learning_rate = 2e-3


def transformer_maskgit(config: ConfigDict) -> None:
    """A MaskGIT: many tokens at once, the surest first."""
    config.family.tokenizer = TOKENIZER
    config.family.network = "maskgit(width=128,depth=4,heads=4)"
    config.family.decoding = "maskgit"
    config.train.steps = 4000
    config.train.learning_rate = 1e-3
    config.sample.steps = 16


def transformer_var(config: ConfigDict) -> None:
    """A VAR: scale after scale, over the tokens of `tokenizer-scales`."""
    config.family.tokenizer = SCALES
    config.family.network = "var(width=128,depth=4,heads=4)"
    config.family.decoding = "var"
    config.train.steps = 4000
    config.train.learning_rate = 1e-3


def diffusion_latent(config: ConfigDict) -> None:
    """A DiT over the tokenizer's vectors (latent diffusion): 64 places, as the transformers have."""
    diffusion(config)
    config.family.tokenizer = TOKENIZER
    config.family.network = "dit(patch=1,width=128,depth=4,heads=4)"
    config.sample.threshold = "none"


def diffusion(config: ConfigDict) -> None:
    """The same DiT over pixels, in patches of 4x4."""
    config.family.network = "dit(patch=4,width=128,depth=4,heads=4)"
    config.train.steps = 4000
    config.train.learning_rate = 2e-3
    config.sample.solver = "heun"
    config.sample.steps = 10
