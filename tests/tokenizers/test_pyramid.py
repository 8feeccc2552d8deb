"""The pyramid of grey steps: exact on every digit, and the rounded mean of each cell on the way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits

from diffusion_jax import tokenizers
from diffusion_jax.errors import UserError
from diffusion_jax.types import ImageSpec


def pyramid(levels=17, size=8, channels=1, options=""):
    spec = ImageSpec(size=size, channels=channels, num_classes=0, levels=levels)
    return tokenizers.build("family.tokenizer", f"pyramid{options}", spec)


def digits():
    """All 1,797, as grey levels 0, ..., 16."""
    return load_digits().images.astype(np.float32)[..., None]


def stages(it, tokens):
    """f^ after each scale, in grey levels of the digits."""
    return [np.asarray(f_hat, np.float64) * 8 + 8 for f_hat in jax.jit(it.scales.stages)(tokens)]


@pytest.mark.parametrize("options", ["", "(scales=(1,2,4,8))", "(scales=(1,8))", "(scales=(1,4,8))"])
def test_every_digit_comes_back_to_the_bit(options):
    it, images = pyramid(options=options), digits() / 8.0 - 1.0
    tokens = np.asarray(jax.jit(it.encode)({}, images, None))
    assert tokens.shape == (1797, *it.shape) == (1797, sum(side**2 for side in it.scales.sides))
    assert tokens.dtype == np.int32
    assert 0 <= tokens.min() <= tokens.max() < it.vocabulary == 33
    np.testing.assert_array_equal(jax.jit(it.decode)({}, tokens), images)


@pytest.mark.parametrize(("levels", "size"), [(256, 16), (2, 4), (3, 6), (256, 12)])
def test_other_images_come_back_to_the_bit(levels, size):
    """Noise, whose means are often halfway between two levels; of sizes that are no power of 2 as well."""
    it = pyramid(levels, size)
    level = np.random.default_rng(0).integers(levels, size=(50, size, size, 1))
    images = np.asarray(level, np.float32) / np.float32((levels - 1) / 2) - np.float32(1.0)
    tokens = jax.jit(it.encode)({}, images, None)
    assert 0 <= tokens.min() <= tokens.max() < it.vocabulary == 2 * levels - 1
    np.testing.assert_array_equal(jax.jit(it.decode)({}, tokens), images)
    np.testing.assert_array_equal(jax.jit(it.encode)({}, images[:7], None), tokens[:7])


def test_each_scale_is_the_rounded_mean_of_its_cells():
    """By NumPy, halves to the even step from the middle level 8; the token is the step from the cell around it."""
    it, levels = pyramid(), digits()
    tokens = jax.jit(it.encode)({}, levels / 8.0 - 1.0, None)
    begin, parent = 0, np.zeros((1797, 1, 1)) + 8
    for side, f_hat in zip((1, 2, 4, 8), stages(it, tokens), strict=True):
        means = levels[..., 0].astype(np.float64).reshape(1797, side, 8 // side, side, 8 // side).mean((2, 4))
        parent = parent.repeat(side // parent.shape[1], 1).repeat(side // parent.shape[2], 2)
        steps = np.rint(means - parent)
        np.testing.assert_array_equal(np.asarray(tokens)[:, begin : begin + side**2].reshape(steps.shape) - 16, steps)
        begin, parent = begin + side**2, parent + steps
        np.testing.assert_array_equal(f_hat[..., 0], parent.repeat(8 // side, 1).repeat(8 // side, 2))


def test_every_scale_brings_the_digits_nearer():
    """Mean square error in grey levels; none is left."""
    it, levels = pyramid(), digits()
    tokens = jax.jit(it.encode)({}, levels / 8.0 - 1.0, None)
    errors = [np.square(f_hat - levels).mean() for f_hat in stages(it, tokens)]
    assert errors[0] > 2.0 * errors[2] > 10.0
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0.0


def test_a_model_is_shown_the_cell_that_a_place_lies_in():
    """Scale by scale as all at once: f^ of the scales before, for each place of the next; within [-1, 1]."""
    it = pyramid()
    tokens = jax.jit(it.encode)({}, digits()[:20] / 8.0 - 1.0, None)
    shown = np.asarray(jax.jit(it.scales.inputs)(tokens)) * 8 + 8
    assert shown.shape == (20, 84, 1)
    begin = 0
    for side, f_hat in zip((2, 4, 8), stages(it, tokens), strict=False):
        places = f_hat[:, :: 8 // side, :: 8 // side].reshape(20, -1, 1)
        np.testing.assert_array_equal(shown[:, begin : begin + side**2], places)
        begin += side**2
    assert 0.0 <= shown.min() <= shown.max() <= 16.0


def test_any_tokens_are_an_image():
    """On the data's levels, between black and white."""
    it = pyramid()
    tokens = jnp.asarray(np.random.default_rng(0).integers(33, size=(30, 85)), jnp.int32)
    images = np.asarray(jax.jit(it.decode)({}, tokens)) * 8 + 8
    assert (images.min(), images.max()) == (0.0, 16.0)
    np.testing.assert_array_equal(images, np.rint(images))


@pytest.mark.parametrize(("size", "sides"), [(32, (1, 2, 4, 8, 16, 32)), (28, (1, 7, 14, 28)), (9, (1, 9))])
def test_sides_where_none_are_given(size, sides):
    assert pyramid(size=size).scales.sides == sides


@pytest.mark.parametrize(
    ("options", "channels", "says"),
    [
        ("", 3, "is for images of one channel, and these have 3"),
        ("(scales=(1,2,4))", 1, "each divide the next, up to the image's side 8"),
        ("(scales=(1,3,8))", 1, "each divide the next"),
        ("(scales=(2,8))", 1, "scales must rise from 1"),
    ],
)
def test_impossible_pyramids_are_refused(options, channels, says):
    with pytest.raises(UserError, match=f"family.tokenizer: pyramid: .*{says}"):
        pyramid(channels=channels, options=options)
