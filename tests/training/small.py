"""A config of digits for every family, each so small that a run takes seconds; the tests of resuming start from it."""

from ml_collections import ConfigDict

from diffusion_jax.cli.config import base


def get_config(family: str = "") -> ConfigDict:
    """The config of `family`, with a checkpoint every three steps."""
    config = base(__file__, family, SMALL)
    config.data.name = "digits"
    config.train.steps = 120 if family == "diffusion" else 60  # the former is interrupted many times
    config.train.batch_size = 16
    config.train.log_every = 5
    config.checkpoint.every = 3
    config.sample.batch_size = 64
    config.evaluate.num_samples = 50
    config.evaluate.bootstrap = 10
    return config


def diffusion(config: ConfigDict) -> None:
    """One block."""
    config.family.network = "dit(patch=4,width=32,depth=1,heads=2)"
    config.sample.steps = 2


def gan(config: ConfigDict) -> None:
    """With all that changes without gradient."""
    config.family.generator = "dcgan(width=8,latent=8)"
    config.family.discriminator = "dcgan(width=8)"
    config.family.regularisers = "r1(every=2)"
    config.family.generator_every = 2
    config.family.spectral_norm = "both"
    config.family.augmentation = "ada(images=1000,geometry=False,color=False)"


def tokenizer(config: ConfigDict) -> None:
    """A game of two, with the weight between them, and codes that follow averages."""
    config.family.network = "vqgan(channels=8,multipliers=(1,1),blocks=1)"
    config.family.bottleneck = "vq(codes=8,latents=2)"
    config.family.discriminator = "patchgan(channels=4,halvings=1)"


def transformer(config: ConfigDict) -> None:
    """One block."""
    config.family.network = "gpt(width=16,depth=1,heads=2,multiple_of=1)"


def vae(config: ConfigDict) -> None:
    """One level of latents."""
    config.family.network = "flat(latents=4,channels=8,multipliers=(1,1))"


SMALL = {"diffusion": diffusion, "gan": gan, "tokenizer": tokenizer, "transformer": transformer, "vae": vae}
