"""Bounds where log p(x) is known: probabilistic PCA (Tipping & Bishop 1999), and the formulas of the training loss.

z ~ N(0, I),  x | z ~ N(W z + mu, sigma^2 I),  so that  x ~ N(mu, C) with C = W W^T + sigma^2 I
z | x ~ N(M^-1 W^T (x - mu), sigma^2 M^-1)  with  M = W^T W + sigma^2 I                      (eq. 5 to 8)
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from diffusion_jax import rng
from diffusion_jax.errors import UserError
from diffusion_jax.plugs import build
from diffusion_jax.variational.bounds import BOUNDS, ELBO, Importance, Terms, training_loss, warmed_up
from diffusion_jax.variational.gaussian import STANDARD, Gaussian, kl, log_density, reparameterised

GENERATOR = np.random.default_rng(0)
W = np.linalg.qr(GENERATOR.normal(size=(5, 2)))[0] @ np.diag([1.5, 0.7])
"""Of orthogonal columns, so that the posterior is diagonal, as ours is."""
MU, SIGMA = GENERATOR.normal(size=5), 0.6
X = MU + GENERATOR.normal(size=(6, 2)) @ W.T + SIGMA * GENERATOR.normal(size=(6, 5))
EXACT = stats.multivariate_normal(MU, W @ W.T + SIGMA**2 * np.eye(5)).logpdf(X)
PRECISION = np.diag(W.T @ W) + SIGMA**2


def keys(seed=0):
    return rng.example_keys(jax.random.key(seed), jnp.arange(len(X)))


def terms(keys, shift=0.0, stretch=1.0):
    """Of the linear model with its exact posterior, whose mean is then moved and whose std is stretched."""
    mean = (X - MU) @ W / PRECISION + shift
    std = np.broadcast_to(stretch * SIGMA / np.sqrt(PRECISION), mean.shape)
    q, eps = Gaussian(jnp.float32(mean), jnp.log(jnp.float32(std))), rng.normal(keys, (2,))
    z = reparameterised(q, eps)
    x = Gaussian(z @ jnp.float32(W.T) + jnp.float32(MU)[None], jnp.full(X.shape, np.log(SIGMA), jnp.float32))
    return Terms(
        log_likelihood=jnp.sum(log_density(x, jnp.float32(X)), axis=1),
        kl=kl(q),
        log_ratio=jnp.sum(log_density(STANDARD, z) - log_density(q, z), axis=1),
    )


def test_the_elbo_is_exact_at_the_optimum():
    """In the mean over draws; the importance-weighted bound with any single draw, since p(x, z) / q(z | x) = p(x)."""
    many = jax.jit(lambda keys: ELBO(draws=4000)(terms, keys))(keys())
    np.testing.assert_allclose(many, EXACT, atol=0.1)
    for draws in (1, 7):
        bound = jax.jit(functools.partial(Importance(draws=draws), terms))
        np.testing.assert_allclose(bound(keys()), EXACT, rtol=1e-4)


def test_away_from_the_optimum_bounds_lie_in_order():
    """ELBO < importance of 4 < importance of 500 < exact; and the ELBO is below by KL(q || posterior), by hand."""
    shift, stretch = 0.4, 1.5
    away = functools.partial(terms, shift=shift, stretch=stretch)

    def mean(bound, repeats):
        values = jax.jit(jax.vmap(lambda seed: bound(away, rng.fold(keys(), seed))))(jnp.arange(repeats))
        return np.asarray(values, np.float64).mean(0)

    elbo, few, more = mean(ELBO(draws=10), 400), mean(Importance(draws=4), 400), mean(Importance(draws=500), 8)
    gap = 0.5 * (shift**2 * PRECISION / SIGMA**2 + stretch**2 - 1.0 - 2.0 * np.log(stretch)).sum()
    np.testing.assert_allclose(elbo, EXACT - gap, atol=0.1)
    assert np.all(elbo + 0.1 < few)
    assert np.all(few + 0.05 < more)
    np.testing.assert_allclose(more, EXACT, atol=0.1)


def test_both_bounds_see_every_draw_alone():
    """Their values from the terms of each draw, by NumPy."""
    away = functools.partial(terms, shift=0.3)
    drawn = [jax.jit(away)(rng.fold(keys(), i)) for i in range(5)]
    elbos = [np.asarray(t.log_likelihood - t.kl.sum(1), np.float64) for t in drawn]
    weights = [np.exp(np.asarray(t.log_likelihood + t.log_ratio, np.float64)) for t in drawn]
    elbo, importance = jax.jit(lambda keys: (ELBO(draws=5)(away, keys), Importance(draws=5)(away, keys)))(keys())
    np.testing.assert_allclose(elbo, np.mean(elbos, 0), rtol=1e-5)
    np.testing.assert_allclose(importance, np.log(np.mean(weights, 0)), rtol=1e-5)


# ------------------------------------------------------------------------------------------ the loss

DRAWN = Terms(
    log_likelihood=jnp.asarray([-3.0, -5.0]),
    kl=jnp.asarray([[0.1, 2.0, 0.5], [0.7, 0.0, 4.0]]),
    log_ratio=jnp.zeros(2),
)


@pytest.mark.parametrize(
    ("weight", "free", "expected"),
    [
        (1.0, 0.0, [3.0 + 2.6, 5.0 + 4.7]),
        (4.0, 0.0, [3.0 + 4.0 * 2.6, 5.0 + 4.0 * 4.7]),
        (0.0, 0.6, [3.0, 5.0]),
        (2.0, 0.6, [3.0 + 2.0 * (0.6 + 2.0 + 0.6), 5.0 + 2.0 * (0.7 + 0.6 + 4.0)]),
    ],
)
def test_weights_and_free_bits(weight, free, expected):
    """By hand: each level of each image counts with `free` at least."""
    np.testing.assert_allclose(training_loss(DRAWN, jnp.float32(weight), free), expected, rtol=1e-6)


def test_no_gradient_lowers_a_level_that_is_free():
    gradient = jax.grad(lambda kl: jnp.sum(training_loss(DRAWN._replace(kl=kl), jnp.float32(1.0), 0.6)))(DRAWN.kl)
    np.testing.assert_array_equal(gradient, [[0.0, 1.0, 0.0], [1.0, 0.0, 1.0]])


def test_warm_up():
    """Linear, then flat; none means at once."""
    got = [float(warmed_up(2.0, 100, jnp.int32(step))) for step in (0, 25, 100, 1000)]
    np.testing.assert_allclose(got, [0.0, 0.5, 2.0, 2.0])
    assert float(warmed_up(2.0, 0, jnp.int32(0))) == 2.0


@pytest.mark.parametrize("name", BOUNDS)
def test_no_draws_are_refused(name):
    with pytest.raises(UserError, match="draws must be at least 1"):
        build("family.likelihood", f"{name}(draws=0)", BOUNDS)
