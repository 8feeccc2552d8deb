"""Losses of the two players against their papers' formulas, and against the optima that the papers prove."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.adversarial.losses import LOSSES

REAL = np.array([-3.0, -0.5, 0.0, 0.7, 1.0, 4.0])
FAKE = np.array([2.0, -1.5, 0.0, -0.2, 1.0, -5.0])


def log_sigmoid(a):
    return -np.log1p(np.exp(-a))


FORMULAS = {
    "non_saturating": (
        lambda r, f: -log_sigmoid(r) - np.log(1.0 - np.exp(log_sigmoid(f))),
        lambda r, f: -log_sigmoid(f),
    ),
    "hinge": (lambda r, f: np.maximum(0, 1 - r) + np.maximum(0, 1 + f), lambda r, f: -f),
    "least_squares": (lambda r, f: 0.5 * (r - 1) ** 2 + 0.5 * f**2, lambda r, f: 0.5 * (f - 1) ** 2),
    "wasserstein": (lambda r, f: f - r, lambda r, f: -f),
    "relativistic": (lambda r, f: -log_sigmoid(r - f), lambda r, f: -log_sigmoid(f - r)),
}
"""(discriminator, generator) of the papers, with D the sigmoid of the logit where they have probabilities."""


def test_every_loss_has_its_formula():
    assert set(FORMULAS) == set(LOSSES)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_their_formulas_an_example_at_a_time(name):
    loss, real, fake = LOSSES[name](), jnp.asarray(REAL, jnp.float32), jnp.asarray(FAKE, jnp.float32)
    for ours, formula in zip((loss.discriminator, loss.generator), FORMULAS[name], strict=True):
        np.testing.assert_allclose(ours(real, fake), formula(REAL, FAKE), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_large_logits_stay_finite(name):
    """exp(200) is not a float32."""
    loss, real, fake = LOSSES[name](), jnp.float32([-200.0, 200.0]), jnp.float32([200.0, -200.0])
    for of_player in (loss.discriminator, loss.generator):
        slopes = jax.grad(lambda r, f, of_player=of_player: jnp.sum(of_player(r, f)), argnums=(0, 1))(real, fake)
        assert np.all(np.isfinite(of_player(real, fake)))
        assert np.all(np.isfinite(slopes))


P, Q = np.array([0.5, 0.3, 0.2]), np.array([0.1, 0.3, 0.6])
OPTIMA = {
    "non_saturating": np.log(P / Q),  # Goodfellow et al. 2014, proposition 1: D = p / (p + q), as a logit
    "least_squares": P / (P + Q),  # Mao et al. 2017, eq. 5, with a = 0 and b = 1
    "relativistic": np.log(P / Q) + 0.8,  # up to a constant, which no pair shows
}


def expected_loss(name, logits):
    """Over independent pairs of a real point of density P and a generated one of density Q."""
    real, fake = (grid.reshape(-1) for grid in jnp.meshgrid(logits, logits, indexing="ij"))
    return jnp.sum(jnp.asarray(np.outer(P, Q).reshape(-1), jnp.float32) * LOSSES[name]().discriminator(real, fake))


@pytest.mark.parametrize("name", OPTIMA)
def test_the_discriminator_is_best_where_the_papers_prove_it(name):
    """On three points whose densities are known: the slope is 0 there, and every other discriminator is worse."""
    best = jnp.asarray(OPTIMA[name], jnp.float32)
    np.testing.assert_allclose(jax.grad(lambda d: expected_loss(name, d))(best), 0.0, atol=1e-6)
    for change in np.eye(3) * 0.5:
        for sign in (-1.0, 1.0):
            assert expected_loss(name, best + jnp.asarray(sign * change, jnp.float32)) > expected_loss(name, best)


def test_the_best_non_saturating_loss_is_the_jensen_shannon_divergence():
    """Goodfellow et al. 2014, theorem 1: -min = -log 4 + 2 JS(p, q)."""
    m = (P + Q) / 2
    js = 0.5 * np.sum(P * np.log(P / m)) + 0.5 * np.sum(Q * np.log(Q / m))
    best = expected_loss("non_saturating", jnp.asarray(np.log(P / Q), jnp.float32))
    np.testing.assert_allclose(best, np.log(4.0) - 2.0 * js, rtol=1e-6)


def test_relativistic_pairs_are_real_i_with_fake_i():
    """A constant added to both changes nothing; another partner does."""
    loss = LOSSES["relativistic"]()
    real, fake = jnp.float32([0.0, 3.0]), jnp.float32([1.0, -2.0])
    for of_player in (loss.discriminator, loss.generator):
        np.testing.assert_allclose(of_player(real + 7.0, fake + 7.0), of_player(real, fake), rtol=1e-5)
        assert not np.allclose(of_player(real, fake[::-1]), of_player(real, fake))


@pytest.mark.parametrize("name", LOSSES)
def test_a_margin_is_positive_where_swapping_the_pair_would_cost(name):
    """Of logits that lie on either side of the border between real and generated, as far as each other."""
    border = 0.5 if name == "least_squares" else 0.0
    loss, real = LOSSES[name](), jnp.float32([-1.3, -0.2, 0.1, 0.3, 0.45, 0.6, 2.0])
    fake = 2.0 * border - real
    cost = loss.discriminator(fake, real) - loss.discriminator(real, fake)
    np.testing.assert_array_equal(np.sign(loss.margin(real, fake)), np.sign(cost))
