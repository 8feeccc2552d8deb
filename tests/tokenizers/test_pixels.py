"""Pixels as tokens: exact both ways."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import tokenizers
from diffusion_jax.data.source import to_float
from diffusion_jax.errors import UserError
from diffusion_jax.types import ImageSpec


def pixels(levels, size=16, channels=1):
    spec = ImageSpec(size=size, channels=channels, num_classes=0, levels=levels)
    return tokenizers.build("family.tokenizer", "pixels", spec)


def test_every_byte_comes_back():
    """As the data sets hold them: 0, ..., 255 as float32, to the bit."""
    it, images = pixels(256), np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    tokens = jax.jit(it.encode)({}, to_float(images), None)
    np.testing.assert_array_equal(tokens, images)
    np.testing.assert_array_equal(jax.jit(it.decode)({}, tokens), to_float(images))


def test_the_digits_come_back():
    """Of 17 levels: k / 8 - 1, as scikit-learn's digits are scaled."""
    it = pixels(17)
    levels = np.arange(256).reshape(1, 16, 16, 1) % 17
    images = (levels / 8.0 - 1.0).astype(np.float32)
    np.testing.assert_array_equal(it.encode({}, images, None), levels)
    np.testing.assert_array_equal(it.decode({}, jnp.asarray(levels)), images)


def test_other_values_go_to_the_nearest_level():
    it = pixels(5, size=2)
    images = jnp.asarray([-3.0, -0.74, 0.2, 0.3]).reshape(1, 2, 2, 1)
    np.testing.assert_array_equal(it.encode({}, images, None).reshape(-1), [0, 1, 2, 3])
    assert (it.grid, it.vocabulary, it.channels) == ((2, 2, 1), 5, 0)


def test_channels_are_tokens_of_one_place():
    assert pixels(256, size=4, channels=3).grid == (4, 4, 3)


def test_unknown_tokenizers_are_refused_by_name():
    with pytest.raises(UserError, match=r"family.tokenizer = 'pixel'.*did you mean 'pixels'"):
        tokenizers.build("family.tokenizer", "pixel", ImageSpec(size=8, channels=1, num_classes=0))
