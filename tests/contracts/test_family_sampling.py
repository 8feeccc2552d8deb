"""What every family promises to the sampler: an image depends on its seed, its index and its condition, and on nothing
else of the batch; it lies in [-1, 1]; and it is what its latent is decoded to.

All weights are drawn at random: those of a network that was not trained would often make images of zeros.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.sampling import Sampler
from tests.contracts.families import VARIANTS, drawn, family, options, sampler, smallest, weights
from tests.training.toys import mesh

WITH_LATENT = [name for name in VARIANTS if family(name).latent]

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.parametrize("name", smallest(VARIANTS))
def test_images(name):
    """f32[n,H,W,C] in [-1, 1], not all of it at the ends; the same twice. Wild weights do not lead out of it."""
    images = drawn(name)
    assert images.shape == (4, *VARIANTS[name].spec.shape)
    assert images.dtype == np.float32
    assert np.abs(images).max() <= 1.0
    assert np.mean(np.abs(images) < 0.99) > 0.02
    np.testing.assert_array_equal(images, drawn(name))
    wild = drawn(name, params=jax.tree.map(lambda leaf: jnp.asarray(2.0 * np.asarray(leaf)), weights(name)))
    assert np.abs(wild).max() <= 1.0
    assert not np.allclose(wild, images, atol=1e-3)


def several(sampler, name, count, seed=3):
    """Images 0 .. count - 1 as a command makes them, in as many batches as it takes."""
    made = sampler.batches(weights(name), seed, sampler.labels(count), count, options(name))
    return np.concatenate(list(made))


@pytest.mark.parametrize("name", smallest(VARIANTS))
def test_an_image_is_that_of_its_seed_and_index(name):
    """Whether 6 are made four at a time, the last two with nothing beside them, or one on each of 8 devices."""
    whole = several(sampler(name), name, 6)
    assert whole.shape[0] == 6
    np.testing.assert_allclose(several(sampler(name, ways=8, batch_size=8), name, 6), whole, atol=1e-5)
    np.testing.assert_allclose(several(sampler(name), name, 2), whole[:2], atol=1e-5)
    assert not np.allclose(several(sampler(name), name, 2, seed=4), whole[:2], atol=1e-3)


@pytest.mark.parametrize("name", smallest(VARIANTS))
def test_an_image_depends_on_its_own_key_and_condition(name):
    """Among others, in another order, and beside others whose labels change."""
    whole = drawn(name)
    np.testing.assert_allclose(drawn(name, index=(1, 2, 0, 3)), whole[[1, 2, 0, 3]], atol=1e-5)
    np.testing.assert_allclose(drawn(name, index=(8, 1, 2, 7))[1:3], whole[1:3], atol=1e-5)
    assert not np.allclose(whole[0], whole[3])  # the same label, another key
    if VARIANTS[name].spec.num_classes:
        other = drawn(name, label=(0, 0, 2, 0))
        np.testing.assert_allclose(other[[0, 2, 3]], whole[[0, 2, 3]], atol=1e-5)
        assert not np.allclose(other[1], whole[1], atol=1e-4)


@pytest.mark.parametrize("name", smallest(VARIANTS))
def test_options_seeds_and_labels_do_not_compile_again(name):
    """And all of them matter."""
    pairs = VARIANTS[name].options | {"seed": (0, 1)}
    if VARIANTS[name].spec.num_classes:
        pairs |= {"label": (0, 1)}
    first = drawn(name, label=0)
    before = sampler(name).program._cache_size()
    for key, values in pairs.items():
        assert not np.allclose(drawn(name, **{"label": 0, key: values[1]}), first, atol=1e-4), key
    assert sampler(name).program._cache_size() == before


@functools.cache
def decoder(name):
    """A sampler of decoded draws, one image at a time."""
    latent = family(name).latent

    def act(weights, keys, condition, options):
        return latent.decode(weights, latent.draw(keys, options), keys, condition, options)

    return Sampler(act, VARIANTS[name].spec, mesh(), 1)


@pytest.mark.parametrize("name", smallest(WITH_LATENT))
def test_an_image_is_its_decoded_latent(name):
    """Draw and decode, image by image, are `generate` of all of them at once."""
    np.testing.assert_allclose(several(decoder(name), name, 4), several(sampler(name), name, 4), atol=1e-5)


@pytest.mark.parametrize("name", smallest(WITH_LATENT))
def test_latents_are_about_standard_normal(name):
    """At temperature 1 and without truncation: over 2,000 draws, mean and spread of each number; each has its own."""
    latent = family(name).latent
    keys = jax.random.split(jax.random.key(0), 2000)
    z = np.asarray(jax.jit(latent.draw)(keys, family(name).sampling(VARIANTS[name].needs))).reshape(2000, -1)
    np.testing.assert_allclose(z.mean(0), 0.0, atol=5.0 / np.sqrt(2000))
    np.testing.assert_allclose(z.std(0), 1.0, atol=5.0 / np.sqrt(4000))
    correlation = np.corrcoef(z, rowvar=False) - np.eye(z.shape[1])
    assert np.abs(correlation).max() < 6.0 / np.sqrt(2000)
