"""What a stack is made of is looked up pixel by pixel in scikit-learn's own arrays."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from diffusion_jax import data
from diffusion_jax.data import digits, stacked_digits
from diffusion_jax.data.source import to_uint8
from diffusion_jax.errors import UserError
from diffusion_jax.settings import DataSettings
from diffusion_jax.types import ImageSpec


@pytest.fixture(scope="module")
def dataset():
    return data.build(DataSettings(name="stacked_digits"))


@pytest.fixture(scope="module")
def single():
    return digits.build(DataSettings(), "")


def index_of_digits(image):
    """The index into scikit-learn's digits of each channel of f32[N,8,8,3]: i64[N,3]; KeyError for what is no digit."""
    grey = [each.astype(np.uint8).tobytes() for each in load_digits().images]
    assert len(set(grey)) == len(grey)
    known = {pixels: i for i, pixels in enumerate(grey)}
    channels = np.moveaxis((image + 1.0) * 8.0, -1, 1).astype(np.uint8)
    return np.array([[known[channel.tobytes()] for channel in each] for each in channels])


@pytest.fixture(scope="module")
def found(dataset):
    """part -> `index_of_digits` of all its stacks."""
    return {part: index_of_digits(getattr(dataset, part).image) for part in ("train", "held_out")}


def test_images_have_three_channels_17_levels_and_no_labels(dataset):
    assert dataset.spec == ImageSpec(size=8, channels=3, num_classes=0, levels=17)
    assert (len(dataset.train), len(dataset.held_out)) == (60_000, 30_000)
    example = dataset.train[59_999]
    assert set(example) == {"image"}
    assert example["image"].shape == (8, 8, 3)
    assert example["image"].dtype == np.float32
    assert set(np.unique(to_uint8(dataset.train.image[:1000], 17))) == {round(255 * level / 16) for level in range(17)}


def test_held_out_stacks_are_of_held_out_digits_only(found):
    """Index i of the digits is held out where i % 3 == 2."""
    assert np.all(found["held_out"] % 3 == 2)
    assert np.all(found["train"] % 3 != 2)


@pytest.mark.parametrize("part", ["train", "held_out"])
def test_every_mode_and_every_image_of_a_digit_is_equally_likely(found, part):
    """Pearson's statistic has mean k and standard deviation sqrt(2 k), at k degrees of freedom."""
    index, label = found[part], load_digits().target

    def z(count, expected, freedom):
        statistic = np.sum((count - expected) ** 2 / expected)
        return (statistic - freedom) / np.sqrt(2.0 * freedom)

    modes = np.bincount(label[index] @ [100, 10, 1], minlength=1000)
    assert modes.min() > 0
    assert abs(z(modes, len(index) / 1000, 999)) < 4.0
    half = np.flatnonzero((np.arange(1797) % 3 == 2) == (part == "held_out"))
    for channel in range(3):
        count = np.bincount(index[:, channel], minlength=1797)[half]
        expected = len(index) / 10 / np.bincount(label[half])[label[half]]
        assert abs(z(count, expected, len(half) - 10)) < 4.0


def test_the_mode_of_a_stack_is_that_of_its_digits(single, found):
    label = load_digits().target
    for part, source, stream in (("train", single.train, 0), ("held_out", single.held_out, 1)):
        _, mode = stacked_digits.stack(source, 30_000, stream)
        np.testing.assert_array_equal(mode, label[found[part][:30_000]] @ [100, 10, 1])


def test_a_stack_is_a_pure_function_of_its_index(dataset, single):
    np.testing.assert_array_equal(data.build(DataSettings(name="stacked_digits")).train.image, dataset.train.image)
    few, mode = stacked_digits.stack(single.train, 7, stream=0)
    np.testing.assert_array_equal(few, dataset.train.image[:7])
    for i in range(7):  # by random access: Philox's counter is the index
        words = np.random.Philox(key=np.array([0, 0], np.uint64), counter=i).random_raw(4)
        assert mode[i] == int(words[0]) % 1000


def test_training_and_held_out_stacks_are_drawn_independently(found):
    label = load_digits().target
    train, held_out = (label[found[part][:30_000]] @ [100, 10, 1] for part in ("train", "held_out"))
    assert np.mean(train == held_out) < 0.002  # 1 in 1,000 by chance


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (DataSettings(name="stacked_digits:8"), ["data.name", "stacked_digits:8"]),
        (DataSettings(name="stacked_digit"), ["data.name", "did you mean 'stacked_digits'?"]),
        (DataSettings(name="stacked_digits", image_size=16), ["data.image_size", "16", "8 pixels"]),
        (DataSettings(name="stacked_digits", train_split="all"), ["data.train_split", "'all'", "does not read"]),
    ],
)
def test_refusals_name_the_field(settings, words):
    with pytest.raises(UserError) as refusal:
        data.build(settings)
    assert all(word in str(refusal.value) for word in words)
    assert "\n" not in str(refusal.value)
