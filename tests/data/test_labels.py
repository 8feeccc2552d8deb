"""`data.labels=False`: the same images, of no class, whatever they come from."""

import numpy as np
import pytest
from PIL import Image

from diffusion_jax import data
from diffusion_jax.data.source import to_arrays
from diffusion_jax.settings import DataSettings


@pytest.fixture
def pictures(tmp_path):
    """Forty grey pictures of two classes."""
    for i in range(40):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        Image.new("L", (4, 4), i).save(tmp_path / "ab"[i % 2] / f"{i}.png")
    return f"folder:{tmp_path}"


@pytest.mark.parametrize("name", ["digits", "digits_canvas", "folder"])
def test_labels_are_left_out_and_images_stay(name, pictures):
    name = pictures if name == "folder" else name
    labelled, plain = (data.build(DataSettings(name=name, labels=labels)) for labels in (True, False))
    assert labelled.spec.num_classes > 1
    assert plain.spec.num_classes == 0
    assert (plain.spec.shape, plain.spec.levels) == (labelled.spec.shape, labelled.spec.levels)
    for part in ("train", "held_out"):
        with_labels, without = getattr(labelled, part), getattr(plain, part)
        assert without[0].keys() == {"image"}
        assert to_arrays(without).label is None
        np.testing.assert_array_equal(to_arrays(without).image, to_arrays(with_labels).image)
