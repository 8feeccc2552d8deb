"""Three digits in the three channels of one 8x8 image: 1,000 modes, for measuring which of them a family leaves out.

    python experiments/mode_coverage.py --out=runs/mode_coverage

trains every family here, samples and counts; one run by itself is

    diffusion-jax train --config=configs/stacked_digits.py:gan --workdir=runs/stacked-gan

Data, their order, batch and number of steps are the same for all families. Networks are small, for one CPU core: a run
takes 1 to 4 minutes of it, and its samples another 1 to 3; of the transformers, whose images are 192 tokens, 15, and
5 to 20. Scores stand in the README.
"""

from ml_collections import ConfigDict

from diffusion_jax.cli.config import base


def get_config(family: str = "") -> ConfigDict:
    """The config of `family`; what is set here is the same for all of them."""
    families = {
        "diffusion": diffusion,
        "gan": gan,
        "transformer": transformer,
        "transformer-maskgit": transformer_maskgit,
        "vae": vae,
    }
    config = base(__file__, family, families)
    config.data.name = "stacked_digits"
    config.train.steps = 2000
    config.train.batch_size = 64
    config.checkpoint.every = 1000
    config.evaluate.max_real = 2000
    return config


def diffusion(config: ConfigDict) -> None:
    """A DiT of 0.7 million parameters with rectified flow; there are no labels to guide by."""
    config.family.network = "dit(patch=2,width=96,depth=4,heads=4)"
    config.train.learning_rate = 4e-3
    one_cycle(config)
    config.sample.solver = "heun"
    config.sample.grid = "quadratic"
    config.sample.steps = 10


def gan(config: ConfigDict) -> None:
    """Residual networks of 66 and 29 thousand parameters, the relativistic loss, R1 and R2 (R3GAN: Huang et al. 2024).

    The plain GAN is `--config.family.loss=non_saturating --config.family.regularisers=`.
    """
    config.family.generator = "resnet(width=32,multipliers=(1,),latent=64)"
    config.family.discriminator = "resnet(width=32,multipliers=(1,),blocks=1)"
    config.family.loss = "relativistic"
    config.family.regularisers = "r1(gamma=0.1) + r2(gamma=0.1)"
    config.train.optimizer = "adam(b1=0.0,b2=0.99)"
    config.train.learning_rate = 1e-3
    config.train.learning_rate_schedule = "cosine_decay_schedule"
    config.train.ema.main = "warmup(decay=0.999)"


def vae(config: ConfigDict) -> None:
    """A ladder of 0.24 million parameters, whose latents are 2, 4 and 8 pixels wide, trained on the plain ELBO.

    Samples are drawn from the mixture of discretised logistics a pixel.
    """
    config.family.network = "ladder(channels=16,multipliers=(1,2,2),levels=(1,1,1),latents=4)"
    config.train.learning_rate = 2e-3
    one_cycle(config)


def transformer(config: ConfigDict) -> None:
    """A GPT of 0.15 million parameters over the 192 numbers of an image, each a token of 17 grey levels."""
    config.family.network = "gpt(width=64,depth=3,heads=4,multiple_of=1)"
    config.train.learning_rate = 3e-3
    one_cycle(config)


def transformer_maskgit(config: ConfigDict) -> None:
    """A MaskGIT of as many layers over the same tokens, drawn in random order in 24 steps."""
    config.family.network = "maskgit(width=64,depth=3,heads=4)"
    config.family.decoding = "maskgit"
    config.train.learning_rate = 2e-3
    one_cycle(config)
    config.sample.steps = 24
    config.sample.choice_temperature = 30.0


def one_cycle(config: ConfigDict) -> None:
    """The learning rate goes up once and down; weights are averaged over some hundred steps."""
    config.train.learning_rate_schedule = "cosine_onecycle_schedule(pct_start=0.05)"
    config.train.ema.main = "warmup(decay=0.995)"
