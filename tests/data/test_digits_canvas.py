"""What stands on a canvas is looked up pixel by pixel in scikit-learn's own arrays."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from diffusion_jax import data
from diffusion_jax.data import digits, digits_canvas
from diffusion_jax.errors import UserError
from diffusion_jax.settings import DataSettings
from diffusion_jax.types import ImageSpec


@pytest.fixture(scope="module")
def dataset():
    return data.build(DataSettings(name="digits_canvas"))


def found(canvas):
    """The indices into scikit-learn's digits on a canvas f32[32,32,1], cell by cell; KeyError for what is no digit.

    A digit's own outermost rows and columns may be black: it is looked for at every place of its cell.
    """
    known = {each.astype(np.uint8).tobytes(): i for i, each in enumerate(load_digits().images)}
    grey = ((canvas[..., 0] + 1.0) * 8.0).astype(np.uint8)
    indices = []
    for cell in (grey[i : i + 16, j : j + 16] for i in (0, 16) for j in (0, 16)):
        if not cell.any():
            continue
        places = [(r, c) for r in range(9) for c in range(9)]
        whole = [known.get(cell[r : r + 8, c : c + 8].tobytes()) for r, c in places]
        fits = [
            i
            for i, (r, c) in zip(whole, places, strict=True)
            if i is not None and cell[r : r + 8, c : c + 8].sum() == cell.sum()
        ]
        if not fits:
            raise KeyError("no digit")
        indices.append(fits[0])
    return indices


def test_images_are_canvases_of_17_levels_and_10_classes(dataset):
    assert dataset.spec == ImageSpec(size=32, channels=1, num_classes=10, levels=17)
    assert (len(dataset.train), len(dataset.held_out)) == (20_000, 4_000)
    assert dataset.train[19_999]["image"].dtype == np.float32
    assert set(np.unique((dataset.train.image[:500] + 1.0) * 8.0)) == set(range(17))


@pytest.mark.parametrize("part", ["train", "held_out"])
def test_a_canvas_shows_2_to_4_digits_of_its_part_and_its_class_is_the_largest(dataset, part):
    """Index i of the digits is held out where i % 3 == 2."""
    source, numbers = getattr(dataset, part), []
    for canvas, label in zip(source.image[:200], source.label[:200], strict=True):
        indices = found(canvas)
        numbers.append(len(indices))
        assert all((i % 3 == 2) == (part == "held_out") for i in indices)
        assert max(load_digits().target[i] for i in indices) == label
    assert set(numbers) == {2, 3, 4}


def test_classes_are_equally_likely_and_all_cells_are_used(dataset):
    """Pearson's statistic has mean k and standard deviation sqrt(2 k), at k degrees of freedom."""
    count = np.bincount(dataset.train.label, minlength=10)
    assert np.sum(np.square(count - 2000) / 2000) < 9 + 5 * np.sqrt(18)
    cells = dataset.train.image[..., 0].reshape(-1, 2, 16, 2, 16).max(axis=(2, 4)) > -1.0
    assert np.allclose(cells.mean(axis=0), 3 / 4, atol=0.02)  # 2, 3 or 4 of 4, equally likely


def test_a_canvas_does_not_depend_on_how_many_there_are():
    single = digits.build(DataSettings(), "")
    few, many = (digits_canvas.compose(single.train, count, stream=0) for count in (3, 50))
    assert np.array_equal(few.image, many.image[:3])
    assert not np.array_equal(many.image[0], digits_canvas.compose(single.train, 1, stream=1).image[0])


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (DataSettings(name="digits_canvas", image_size=64), "data.image_size = 64: canvases are 32 pixels wide"),
        (DataSettings(name="digits_canvas:x"), "data.name = 'digits_canvas:x': write plainly 'digits_canvas'"),
    ],
)
def test_other_sizes_and_arguments_are_refused(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        data.build(settings)
