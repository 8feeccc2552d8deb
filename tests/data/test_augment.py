"""Mirroring: half of the images, each as itself or as its mirror image, by its own key."""

import jax.numpy as jnp
import numpy as np

from diffusion_jax import rng
from diffusion_jax.data import augment


def test_half_of_the_images_are_mirrored_each_by_its_own_key():
    image = np.random.default_rng(0).integers(0, 256, (400, 3, 4, 1), dtype=np.uint8)
    batch = {"image": jnp.asarray(image), "index": jnp.arange(400), "label": jnp.zeros(400, jnp.int32)}
    flipped = augment.flip(batch, rng.stream(0, "augment", 5))
    same = (np.asarray(flipped["image"]) == image).all((1, 2, 3))
    mirrored = (np.asarray(flipped["image"]) == image[:, :, ::-1]).all((1, 2, 3))
    assert (same ^ mirrored).all()
    assert 150 < mirrored.sum() < 250  # five standard deviations around 200
    assert flipped["image"].dtype == jnp.uint8
    assert flipped["label"] is batch["label"]

    part = {key: value[100:] for key, value in batch.items()}
    np.testing.assert_array_equal(augment.flip(part, rng.stream(0, "augment", 5))["image"], flipped["image"][100:])
    other = augment.flip(batch, rng.stream(0, "augment", 6))["image"]
    assert (np.asarray(other) != np.asarray(flipped["image"])).any()
