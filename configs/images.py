"""Any images: `--config.data.name=folder:PATH` or `tfds:NAME`, and `--config.data.image_size`.

    diffusion-jax train --config=configs/images.py:diffusion --workdir=runs/mine \
        --config.data.name=folder:/path/to/images --config.data.image_size=64

Starting points for a GPU or a TPU, whose scores nobody has measured yet; on a CPU they take days. Data, batch and steps
are the same for all. A transformer is over codes that a tokenizer was trained to make before:

    diffusion-jax train --config=configs/images.py:tokenizer --workdir=runs/mine-tokenizer ...
    diffusion-jax train --config=configs/images.py:transformer --workdir=runs/mine-transformer \
        --config.family.tokenizer=workdir:runs/mine-tokenizer ...
"""

from ml_collections import ConfigDict

from diffusion_jax.cli.config import base


def get_config(family: str = "") -> ConfigDict:
    """The config of `family`; what is set here is the same for all of them."""
    families = {
        "diffusion": diffusion,
        "gan": gan,
        "tokenizer": tokenizer,
        "transformer": transformer,
        "vae": vae,
    }
    config = base(__file__, family, families)
    config.data.name = "folder:images"
    config.data.image_size = 64
    config.train.steps = 200_000
    config.train.batch_size = 256
    config.checkpoint.every = 5000
    config.checkpoint.keep_every = 50_000
    config.sample.every = 10_000
    config.evaluate.every = 10_000
    return config


def diffusion(config: ConfigDict) -> None:
    """A DiT-S with rectified flow."""
    config.family.network = "dit(patch=4,width=384,depth=12,heads=6)"
    config.train.learning_rate = 3e-4
    config.train.learning_rate_schedule = "warmup_constant_schedule(warmup_steps=1000)"
    config.train.ema.main = "warmup(decay=0.9999)"


def gan(config: ConfigDict) -> None:
    """R3GAN (Huang et al. 2024) at half its width, with its loss, R1 and R2.

    The images' side must be a power of 2. How large gamma should be depends on the data, and grows with the side. The
    paper has no clipping of gradients: with it the penalties would weigh less whenever they are large.
    """
    config.family.generator = "r3gan(channels_max=384)"
    config.family.discriminator = "r3gan(channels_max=384)"
    config.family.loss = "relativistic"
    config.family.regularisers = "r1(gamma=1.0) + r2(gamma=1.0)"
    config.train.clip_norm = 0.0
    config.train.optimizer = "adam(b1=0.0,b2=0.99)"
    config.train.learning_rate = 2e-4
    config.train.learning_rate_schedule = "cosine_decay_schedule"
    config.train.ema.main = "warmup(decay=0.999)"


def vae(config: ConfigDict) -> None:
    """A ladder of eight levels, two at each of four resolutions, trained on the plain ELBO."""
    config.family.network = "ladder(channels=64,multipliers=(1,2,4,4),blocks=2,levels=(2,2,2,2),latents=16)"
    config.train.learning_rate = 1e-3
    config.train.learning_rate_schedule = "warmup_cosine_decay_schedule(init_value=0.0,warmup_steps=1000)"
    config.train.ema.main = "warmup(decay=0.9999)"


def tokenizer(config: ConfigDict) -> None:
    """Stage one of a transformer: VQGAN's codec (Esser et al. 2021), whose codes stand for 8x8 pixels each.

    The discriminator enters when there is something to judge. The paper has no clipping of gradients.
    """
    config.family.network = "vqgan(channels=64,multipliers=(1,1,2,4),attention=(8,))"
    config.family.bottleneck = "vq(codes=1024,latents=64)"
    config.family.discriminator = "patchgan"
    config.family.discriminator_start = 20_000
    config.train.clip_norm = 0.0
    config.train.optimizer = "adam(b1=0.5,b2=0.9)"
    config.train.learning_rate = 1e-4
    config.train.ema.main = "warmup(decay=0.999)"


def transformer(config: ConfigDict) -> None:
    """A MaskGIT (Chang et al. 2022) of 12 blocks over the codes of a trained tokenizer, drawn in 12 steps."""
    config.family.tokenizer = "workdir:runs/mine-tokenizer"
    config.family.network = "maskgit(width=512,depth=12,heads=8,dropout=0.1,scan=True)"
    config.family.decoding = "maskgit"
    config.family.label_smoothing = 0.1
    config.train.optimizer = "adamw(b2=0.96,weight_decay=0.045)"
    config.train.learning_rate = 1e-4
    config.train.learning_rate_schedule = "warmup_constant_schedule(warmup_steps=5000)"
    config.train.ema.main = "warmup(decay=0.9999)"
    config.sample.steps = 12
