"""Every registered family: it has its rows in the table, its functions have the shapes that the contract says, what it
cannot do it refuses by name, and nobody who relies on the contract knows which families there are.
"""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

from diffusion_jax import families, rng
from diffusion_jax.errors import UserError
from diffusion_jax.families import FAMILIES
from diffusion_jax.types import ImageSpec
from tests.contracts.families import LABELLED, SMALLEST, TRAINED, VARIANTS, batch, family, options, smallest, weights

PACKAGE = Path(families.__file__).parents[1]
BLIND = sorted(
    [PACKAGE / "sampling.py", *(PACKAGE / "training").rglob("*.py"), *(PACKAGE / "evaluation").rglob("*.py")]
)
"""Files that see of a family what `types.Family` says, and nothing else."""


def test_every_family_has_its_variants():
    assert {row.section["name"] for row in VARIANTS.values()} == set(FAMILIES)
    assert all(row.worse is None or row.worse in TRAINED for row in VARIANTS.values())
    assert sorted(VARIANTS[name].section["name"] for name in SMALLEST) == sorted(FAMILIES)
    assert set(SMALLEST) <= set(TRAINED)


@pytest.mark.parametrize("file", BLIND, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_training_and_evaluation_name_no_family(file):
    """In no word of code or prose; the package's own name is none."""
    text = re.sub(r"diffusion[-_]jax", "", file.read_text())
    words = {word.lower().removesuffix("s") for word in re.findall(r"[A-Za-z]+", text)}
    assert not words & set(FAMILIES)


# ------------------------------------------------------------------------------------------ shapes


def shapes(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), tree)


@pytest.mark.parametrize("name", TRAINED)
def test_parameters_are_float32_trees_by_player(name):
    """Of each player one, whatever the precision of the arithmetic."""
    it = family(name)
    names = [player.name for player in it.players]
    assert it.name == VARIANTS[name].section["name"]
    assert len(set(names)) == len(names) > 0
    for precision in ("float32", "bfloat16"):
        params, _ = jax.eval_shape(family(name, precision).init, jax.random.key(0))
        assert set(params) == set(names)
        assert all(jax.tree.leaves(tree) for tree in params.values())
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {"float32"}


@pytest.mark.parametrize("name", smallest(VARIANTS))
def test_functions_have_their_shapes(name):
    """Images, latents and bits per dimension of 5 examples, as `types` has them."""
    it, spec, chosen = family(name), VARIANTS[name].spec, options(name)
    data, keys = batch(spec, 5), rng.sample_keys(np.uint32(0), np.arange(5))
    condition = {"label": data["label"]} if spec.num_classes else {}
    images = ((5, *spec.shape), "float32")
    assert shapes(jax.eval_shape(it.generate, weights(name), keys, condition, chosen)) == images
    if it.nll:
        assert shapes(jax.eval_shape(it.nll, weights(name), data, jax.random.key(0))) == ((5,), "float32")
    if it.latent:
        z = jax.eval_shape(it.latent.draw, keys, chosen)
        assert shapes(z) == ((5, *it.latent.shape), "float32")
        assert shapes(jax.eval_shape(it.latent.decode, weights(name), z, keys, condition, chosen)) == images
    if it.latent and it.latent.encode:
        encoded = jax.eval_shape(it.latent.encode, weights(name), data["image"], keys, condition, chosen)
        assert shapes(encoded) == shapes(z)


# ------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("name", FAMILIES)
def test_default_fields_build_the_family(name):
    section, sample = families.default_fields(name)
    it = families.build(section, ImageSpec(size=32, channels=3, num_classes=10), "float32")
    assert it.name == name
    it.sampling(sample)


@pytest.mark.parametrize("name", VARIANTS)
def test_unknown_options_are_refused_by_name(name):
    with pytest.raises(UserError, match=r"sample.stepz"):
        family(name).sampling({"stepz": 3})


@pytest.mark.parametrize("name", FAMILIES)
def test_unknown_fields_are_refused_by_name(name):
    with pytest.raises(UserError, match=r"family.netwrk = 'dit'"):
        families.build({"name": name, "netwrk": "dit"}, LABELLED, "float32")


@pytest.mark.parametrize(
    ("section", "says"),
    [({"name": "difusion"}, "family.name = 'difusion'.*did you mean 'diffusion'"), ({}, "family.name = ''")],
)
def test_unknown_families_are_refused_by_name(section, says):
    with pytest.raises(UserError, match=says):
        families.build(section, LABELLED, "float32")
