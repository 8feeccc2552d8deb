import numpy as np
import pytest
from sklearn.datasets import load_digits

from diffusion_jax import data
from diffusion_jax.data.source import to_float, to_uint8
from diffusion_jax.errors import UserError
from diffusion_jax.settings import DataSettings
from diffusion_jax.types import ImageSpec


def test_every_pixel_and_label_is_scikit_learns():
    dataset = data.build(DataSettings(name="digits"))
    truth = load_digits()
    assert dataset.spec == ImageSpec(size=8, channels=1, num_classes=10, levels=17)
    assert (len(dataset.train), len(dataset.held_out)) == (1198, 599)
    train = [i for i in range(1797) if i % 3 != 2]
    held_out = [i for i in range(1797) if i % 3 == 2]
    for source, index in ((dataset.train, train), (dataset.held_out, held_out)):
        for place in (0, 1, 2, 100, len(index) - 1):
            example = source[place]
            grey = (example["image"].astype(np.float64)[..., 0] + 1.0) * 8.0
            assert example["image"].shape == (8, 8, 1)
            assert example["image"].dtype == np.float32
            np.testing.assert_array_equal(grey, truth.images[index[place]])
            assert example["label"] == truth.target[index[place]]


def test_grey_levels_are_stored_as_uint8_from_0_to_255():
    dataset = data.build(DataSettings(name="digits"))
    image = dataset.train.image
    assert image.min() == -1.0
    assert image.max() == 1.0
    stored = to_uint8(image, levels=17)
    assert set(np.unique(stored)) == {round(255 * level / 16) for level in range(17)}
    np.testing.assert_array_equal(to_float(np.array([0, 255], np.uint8)), np.array([-1.0, 1.0], np.float32))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (DataSettings(name="digts"), ["data.name", "'digts'", "did you mean 'digits'?", "folder", "tfds"]),
        (DataSettings(name="digits:8"), ["data.name", "digits:8"]),
        (DataSettings(name="digits", image_size=16), ["data.image_size", "16", "8 pixels"]),
        (DataSettings(name="digits", held_out_split="train"), ["data.held_out_split", "train_split"]),
    ],
)
def test_refusals_name_the_field(settings, words):
    with pytest.raises(UserError) as refusal:
        data.build(settings)
    assert all(word in str(refusal.value) for word in words)
    assert "\n" not in str(refusal.value)
