"""Penalties of the slope against closed forms: of a linear and of a quadratic discriminator."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import plugs
from diffusion_jax.adversarial.regularisers import REGULARISERS, lazily
from diffusion_jax.errors import UserError
from tests.arrays import normals

SHAPE = (4, 3, 3, 2)


REAL, FAKE, W = normals(*SHAPE, seed=1), normals(*SHAPE, seed=2), normals(*SHAPE[1:], seed=3)
KEYS = jax.random.split(jax.random.key(0), SHAPE[0])


def built(text):
    return plugs.build("family.regularisers", text, REGULARISERS)


def linear(w):
    """D(x) = w x + 3, whose slope is w everywhere."""
    return lambda x: jnp.einsum("nhwc,hwc->n", x, w) + 3.0


def quadratic(x):
    """D(x) = |x|^2, whose slope at x is 2 x."""
    return jnp.sum(jnp.square(x), axis=(1, 2, 3))


@pytest.mark.parametrize("name", ["r1", "r2"])
def test_r1_and_r2_of_a_linear_discriminator(name):
    """gamma/2 |w|^2 for each image, and gamma w is the derivative by w."""
    penalise = built(f"{name}(gamma=3.0)")
    penalty = lambda w: penalise(linear(w), REAL, FAKE, KEYS)
    np.testing.assert_allclose(penalty(W), np.full(4, 1.5 * np.sum(np.square(W))), rtol=1e-5)
    np.testing.assert_allclose(jax.grad(lambda w: jnp.mean(penalty(w)))(W), 3.0 * W, rtol=1e-5)


def test_r1_is_of_real_images_and_r2_of_generated_ones():
    """gamma/2 |2 x|^2 of a quadratic discriminator, image by image."""
    for name, images in (("r1", REAL), ("r2", FAKE)):
        expected = 0.25 * np.sum(np.square(2.0 * images), axis=(1, 2, 3))
        np.testing.assert_allclose(built(f"{name}(gamma=0.5)")(quadratic, REAL, FAKE, KEYS), expected, rtol=1e-5)


@pytest.mark.parametrize("norm", [1.0, 0.25, 3.0])
def test_the_gradient_penalty_of_a_linear_discriminator(norm):
    """weight (|w| - 1)^2: nothing for one that is 1-Lipschitz and as steep as that allows."""
    w = norm * W / jnp.linalg.norm(W)
    penalty = built("gradient_penalty(weight=7.0)")(linear(w), REAL, FAKE, KEYS)
    np.testing.assert_allclose(penalty, np.full(4, 7.0 * (norm - 1.0) ** 2), rtol=1e-4, atol=1e-9)


def test_the_gradient_penalty_looks_between_the_images_of_a_pair():
    """At u real + (1 - u) fake, u uniform: with fake = 0 and 4 pixels of 1, the slope of 10 |x|^2 there is 40 u."""
    n = 400
    real = jnp.ones((n, 2, 2, 1))
    keys = jax.random.split(jax.random.key(1), n)
    penalty = np.asarray(built("gradient_penalty(weight=1.0)")(lambda x: 10.0 * quadratic(x), real, 0.0 * real, keys))
    steep = penalty > 1.0  # 40 u > 2, and then the root of (40 u - 1)^2 is known
    u = (1.0 + np.sqrt(penalty[steep])) / 40.0
    assert np.mean(steep) > 0.9
    assert np.all(u < 1.0)
    assert abs(np.mean(u) - 0.525) < 4 * 0.275 / np.sqrt(n)
    assert len(np.unique(u)) > 0.95 * len(u)


def test_the_gradient_penalty_can_be_differentiated_where_there_is_no_slope():
    penalise = built("gradient_penalty")
    gradient = jax.grad(lambda w: jnp.sum(penalise(linear(w), REAL, FAKE, KEYS)))(jnp.zeros_like(W))
    assert np.all(np.isfinite(gradient))


def test_penalties_of_several_are_in_one_string():
    first, second = plugs.build_all("family.regularisers", "r1(gamma=1.0) + r2(gamma=2.0,every=4)", REGULARISERS)
    assert (first.gamma, first.every, second.gamma, second.every) == (1.0, 1, 2.0, 4)
    assert plugs.build_all("family.regularisers", "", REGULARISERS) == ()


@pytest.mark.parametrize("every", [1, 4])
def test_lazy_penalties_are_the_same_on_average(every):
    """Over a period; and in the steps between there is nothing, in the derivative either."""
    penalise = built("r1(gamma=3.0)")

    @jax.jit
    def value_and_slope(step):
        return jax.value_and_grad(
            lambda w: jnp.mean(lazily(every, step, lambda: penalise(linear(w), REAL, FAKE, KEYS)))
        )(W)

    values, slopes = zip(*(value_and_slope(jnp.int32(step)) for step in range(8)), strict=True)
    np.testing.assert_allclose(np.mean(values), 1.5 * np.sum(np.square(W)), rtol=1e-5)
    np.testing.assert_allclose(np.mean(slopes, axis=0), 3.0 * W, rtol=1e-4)
    assert np.count_nonzero(values) == 8 // every


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("r1(gamma=0.0)", "gamma must be positive"),
        ("r2(gamma=-1.0)", "gamma must be positive"),
        ("gradient_penalty(weight=0.0)", "weight must be positive"),
        ("r1(every=0)", "every must be at least 1"),
        ("r1(weight=1.0)", "no option 'weight'"),
        ("r3", "there is no 'r3'"),
    ],
)
def test_impossible_penalties_are_refused(text, says):
    with pytest.raises(UserError, match=says):
        built(text)
