"""Patches: what stands where, and back to the bit."""

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import tokenizers
from diffusion_jax.errors import UserError
from diffusion_jax.types import ImageSpec


def patches(size, channels=3):
    spec = ImageSpec(size=8, channels=channels, num_classes=0)
    return tokenizers.build("family.tokenizer", f"patches(size={size})", spec)


@pytest.mark.parametrize(("size", "channels"), [(1, 1), (2, 3), (4, 1), (8, 3)])
def test_a_place_holds_its_own_pixels(size, channels):
    """By NumPy's slices, row after row; images in [-1, 1] come back to the bit, others are kept in range."""
    it = patches(size, channels)
    images = np.random.default_rng(0).uniform(-1.0, 1.0, (2, 8, 8, channels)).astype(np.float32)
    latents = np.asarray(it.encode({}, jnp.asarray(images), None))
    assert latents.shape == (2, *it.grid[:2], it.channels)
    assert (it.grid, it.vocabulary, it.width) == ((8 // size, 8 // size, 1), 0, size * size * channels)
    for i, j in np.ndindex(it.grid[:2]):
        own = images[:, i * size : (i + 1) * size, j * size : (j + 1) * size]
        np.testing.assert_array_equal(latents[:, i, j], own.reshape(2, -1))
    np.testing.assert_array_equal(it.decode({}, jnp.asarray(latents)), images)
    np.testing.assert_array_equal(
        it.of_vectors({}, it.vectors({}, 2.0 * jnp.asarray(images), None)), np.clip(2.0 * images, -1, 1)
    )


@pytest.mark.parametrize("size", [0, 3, 16])
def test_other_sizes_are_refused(size):
    with pytest.raises(UserError, match=r"family.tokenizer: patches: size must divide the images' 8 pixels"):
        patches(size)
