"""What every family with a likelihood promises to the evaluation: bits per dimension that can be compared.

The images are discrete, and so is what is measured: an upper bound of -log2 P(image) / dimensions in the mean. So on
images of entropy H no model comes below H / dimensions, however good it is. Here each dimension is one of four grey
levels, all alike and independent: H / dimensions is 2 bits, and 64 images of 64 dimensions leave little to chance.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.settings import TrainSettings
from diffusion_jax.training.step import Trainer
from tests.contracts.families import TRAINED, VARIANTS, batch, family, noise, smallest, weights

MEASURED = [name for name, row in VARIANTS.items() if row.bounds or row.exact]
LEARNED = [name for name in MEASURED if name in TRAINED]
COUNT, EXAMPLES = 64, 512

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_every_family_with_a_likelihood_has_its_bounds_in_the_table():
    assert {name for name in VARIANTS if family(name).nll} == set(MEASURED)


@functools.cache
def program(name, bound):
    return jax.jit(family(name, **({"likelihood": bound} if bound else {})).nll)


def bits(name, params, bound=None, data=None):
    """Bits per dimension f32[n], by the tightest bound if no other is given, where there are bounds."""
    data = batch(VARIANTS[name].spec, COUNT) if data is None else data
    bound = bound or next(reversed(VARIANTS[name].bounds), None)
    return np.asarray(program(name, bound)(params, data, jax.random.key(7)))


@functools.cache
def learner(name):
    """image f32[EXAMPLES,H,W,C] -> the parameters before and after 150 steps on batches of them."""
    spec = VARIANTS[name].spec
    trainer = Trainer(family(name), TrainSettings(batch_size=32, learning_rate=5e-3, ema={}), seed=0)

    @jax.jit
    def learn(image):
        def step(state, i):
            data = batch(spec, 32) | {"image": jax.lax.dynamic_slice_in_dim(image, 32 * (i % (EXAMPLES // 32)), 32)}
            return trainer.step(state, data, {})[0], None

        begin = trainer.init()
        return begin.params, jax.lax.scan(step, begin, jnp.arange(150))[0].params

    return learn


@pytest.mark.parametrize("name", smallest(MEASURED, "vae-flat"))
def test_one_finite_number_an_image(name):
    """Which depends on the image, its label and, unless it is exact, its own key, and on nothing else of the batch."""
    data = batch(VARIANTS[name].spec, COUNT)
    whole = bits(name, weights(name))
    assert whole.shape == (COUNT,)
    assert whole.dtype == np.float32
    assert np.all(np.isfinite(whole))
    order = np.random.default_rng(0).permutation(COUNT)
    shuffled = bits(name, weights(name), data=jax.tree.map(lambda rows: rows[order], data))
    np.testing.assert_allclose(shuffled, whole[order], rtol=1e-4)
    for column in ("image", "index", *(["label"] if "label" in data else [])):
        rolled = data | {column: data[column].at[: COUNT // 2].set(jnp.roll(data[column], 1, axis=0)[: COUNT // 2])}
        other = bits(name, weights(name), data=rolled)
        np.testing.assert_allclose(other[COUNT // 2 :], whole[COUNT // 2 :], rtol=1e-4)
        assert np.allclose(other, whole, rtol=1e-4) == (VARIANTS[name].exact and column == "index"), column


@pytest.mark.parametrize("name", smallest(LEARNED, "vae-flat"))
def test_no_model_is_below_the_entropy(name):
    """Of noise 2 bits, of one image again and again 0: however well the model knows such images by now.

    Without what makes a density of continuous images comparable to that, the second figure would fall below 0.
    """
    spec = VARIANTS[name].spec
    entropy = np.log2(spec.levels)
    begin, of_noise = learner(name)(noise(spec, EXAMPLES, seed=1))
    for params in (weights(name), begin, of_noise):
        assert bits(name, params).mean() > entropy - 0.01
    assert bits(name, of_noise).mean() < bits(name, weights(name)).mean()

    image = np.broadcast_to(noise(spec, 1), (EXAMPLES, *spec.shape))
    _, of_image = learner(name)(image)
    again = bits(name, of_image, data=batch(spec, COUNT) | {"image": jnp.asarray(image[:COUNT])})
    assert 0.0 < again.mean() < 0.8 * entropy


@pytest.mark.parametrize("name", smallest(name for name in MEASURED if len(VARIANTS[name].bounds) > 1))
def test_bounds_lie_in_order_above_the_entropy(name):
    """Of the same model on the same images, before and after it has learned: the looser the bound, the more bits."""
    spec = VARIANTS[name].spec
    _, learned = learner(name)(noise(spec, EXAMPLES, seed=1))
    for params in (weights(name), learned):
        means = [bits(name, params, bound).mean() for bound in VARIANTS[name].bounds]
        assert all(loose > tight for loose, tight in itertools.pairwise(means)), means
        assert means[-1] > np.log2(spec.levels) - 0.01
