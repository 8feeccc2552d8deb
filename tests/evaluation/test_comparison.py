"""Which differences between two runs keep their figures from being compared, and which do not."""

import pytest

from diffusion_jax.errors import UserError
from diffusion_jax.evaluation import comparison
from diffusion_jax.settings import common_fields


def conditions(size=8, **fields):
    """Of a run with these fields of `data`, whose images are `size` pixels wide."""
    evaluation = dict.fromkeys(comparison.EFFORT, 60) | {"features": {"name": "a classifier", "fingerprint": "0a1b"}}
    evaluation |= {"metrics": {"frechet": {"floor": 1.5}}}
    config = common_fields()
    return comparison.conditions(config | {"data": config["data"] | fields}, size, evaluation)


@pytest.mark.parametrize(
    "fields", [{"image_size": 8}, {"flip": True}, {"augment": "edm"}, {"device_megabytes": 0}, {"data_dir": "/data"}]
)
def test_what_changes_no_image_that_is_judged_compares(fields):
    """An image size of 0 is the images' own; flips and augmentation are a part of training."""
    comparison.check({"a": conditions(), "b": conditions(**fields)})


@pytest.mark.parametrize(
    ("field", "value"),
    [("name", "stacked_digits"), ("train_split", "all"), ("held_out_split", "validation"), ("labels", False)],
)
def test_what_changes_the_judgement_is_refused(field, value):
    with pytest.raises(UserError, match=rf"data\.{field} is .* for a and {value!r} for b"):
        comparison.check({"a": conditions(), "b": conditions(**{field: value})})
    with pytest.raises(UserError, match="image_size is 8 for a and 16 for b"):
        comparison.check({"a": conditions(size=8), "b": conditions(size=16)})
