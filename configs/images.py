"""Any images: `--config.data.name=folder:PATH` or `tfds:NAME`, and `--config.data.image_size`.

    diffusion-jax train --config=configs/images.py:diffusion --workdir=runs/mine \
        --config.data.name=folder:/path/to/images --config.data.image_size=64

A starting point for a GPU or a TPU, whose score nobody has measured yet; on a CPU it takes days.
"""

from ml_collections import ConfigDict

from diffusion_jax.cli.config import base


def get_config(family: str = "") -> ConfigDict:
    """The config of `family`; what is set here is the same for all of them."""
    config = base(__file__, family, {"diffusion": diffusion})
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
