"""scikit-learn's handwritten digits: 1,797 real images, 8x8, 17 grey levels, 10 classes; on every machine already."""

import numpy as np

from diffusion_jax.data.source import ArraySource, Dataset
from diffusion_jax.errors import require
from diffusion_jax.settings import DataSettings
from diffusion_jax.types import ImageSpec

READS = ("image_size",)


def build(settings: DataSettings, argument: str) -> Dataset:
    """Images f32[N,8,8,1], grey levels 0..16 mapped to [-1, 1]. Index i is held out where i % 3 == 2: 599 of 1,797.

    Raises:
      UserError: for `data.image_size` other than 8, and for an argument after "digits:".
    """
    require(not argument, "data.name", f"digits:{argument}", "write plainly 'digits'")
    require(settings.image_size in (0, 8), "data.image_size", settings.image_size, "the digits are 8 pixels wide")
    from sklearn.datasets import load_digits  # a second to import

    digits = load_digits()
    image = (digits.images / 8.0 - 1.0).astype(np.float32)[..., None]
    label = digits.target.astype(np.int32)
    held_out = np.arange(len(image)) % 3 == 2
    return Dataset(
        name="digits",
        spec=ImageSpec(size=8, channels=1, num_classes=10, levels=17),
        train=ArraySource(image=image[~held_out], label=label[~held_out]),
        held_out=ArraySource(image=image[held_out], label=label[held_out]),
    )
