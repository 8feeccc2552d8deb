"""Codes: shares and perplexity against NumPy and known values, digits, the straight-through gradient."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.tokenizers.bottlenecks import codes
from tests.arrays import normals

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_perplexity():
    """K for K codes used alike, 1 for a single one, 2^1.75 for 1.75 bits (1/2, 1/4, 1/8, 1/8)."""
    np.testing.assert_allclose(codes.perplexity(jnp.full(7, 1 / 7)), 7.0, rtol=1e-6)
    np.testing.assert_allclose(codes.perplexity(jnp.eye(7)[3]), 1.0, rtol=1e-6)
    np.testing.assert_allclose(codes.perplexity(jnp.array([0.5, 0.25, 0.125, 0.125, 0.0])), 2.0**1.75, rtol=1e-6)


def seen(batches, count=5):
    """Usage after (step, tokens) one after the other."""
    usage = codes.begin(count)
    for step, tokens in batches:
        usage = codes.counted(usage, jnp.int32(step), jnp.asarray(tokens, jnp.int32))
    return usage


def test_shares_are_running_means():
    """p <- 0.99 p + 0.01 n_k / n, by NumPy, over steps of different sizes."""
    generator = np.random.default_rng(0)
    steps = [generator.integers(5, size=(size, 2, 3)) for size in (4, 7, 1, 5)]
    expected = np.zeros(5)
    for tokens in steps:
        expected = 0.99 * expected + 0.01 * np.bincount(tokens.ravel(), minlength=5) / tokens.size
    np.testing.assert_allclose(codes.folded(seen(enumerate(steps))), expected, rtol=1e-5)


def test_microbatches_count_as_one_step():
    """To the bit: counts are whole numbers."""
    generator = np.random.default_rng(0)
    steps = [generator.integers(5, size=(4, 2, 3)) for _ in range(3)]
    parts = [(step, half) for step, tokens in enumerate(steps) for half in (tokens[:1], tokens[1:])]
    jax.tree.map(np.testing.assert_array_equal, seen(parts), seen(enumerate(steps)))


@pytest.mark.parametrize(
    ("tokens", "perplexity", "usage"), [(np.arange(5), 5.0, 1.0), ([2, 2, 2], 1.0, 0.2), ([], 1.0, 0.0)]
)
def test_metrics_of_the_first_step(tokens, perplexity, usage):
    """Shares of a single step say what it used; of none, nothing is used."""
    metrics = codes.metrics(seen([(0, tokens)]))
    np.testing.assert_allclose([metrics["perplexity"], metrics["usage"]], [perplexity, usage], rtol=1e-5)


def test_a_code_that_was_used_long_ago_is_rare():
    """In the first step alone: its share 0.99^n falls below a hundredth of 1/2 after log(0.005) / log(0.99) = 527.2."""
    shares = lambda n: jnp.array([0.99**n, 1.0 - 0.99**n])
    at = lambda n: codes.begin(2)._replace(shares=shares(n))
    assert float(codes.metrics(at(527))["usage"]) == 1.0
    assert float(codes.metrics(at(529))["usage"]) == 0.5


def test_shares_since_uniform_add_up_to_1():
    """By NumPy: 0.99^n / K more than the running mean, n being the steps that saw any token."""
    steps = [[0, 0, 3], [1], [], [2, 2, 2, 2]]
    usage, p = seen(enumerate(steps)), np.full(5, 0.2)
    for tokens in steps:
        p = 0.99 * p + 0.01 * np.bincount(tokens, minlength=5) / len(tokens) if tokens else p
    np.testing.assert_allclose(codes.since_uniform(usage), p, rtol=1e-6)
    np.testing.assert_allclose(p.sum(), 1.0)


def test_how_many_codes_can_have_been_seen():
    """Of n tokens drawn alike from K codes 1 - (1 - 1/K)^n are seen; older steps count 0.99 less each."""
    batches = [np.zeros(size, int) for size in (40, 10, 30)]
    usage = seen(enumerate(batches), count=50)
    expected = 1.0 - (1.0 - 1.0 / 50.0) ** (0.99**2 * 40 + 0.99 * 10 + 30)
    assert float(codes.metrics(usage)["usable"]) == pytest.approx(expected, rel=0.01)


def test_digits_write_every_code_once():
    """As nested loops count, the first digit fastest."""
    bases = (3, 2, 4)
    expected = [digits[::-1] for digits in itertools.product(range(4), range(2), range(3))]
    found = codes.digits(jnp.arange(24), bases)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(codes.token(found, bases), np.arange(24))


@pytest.mark.parametrize("bases", [(2,), (1000,), (65_536,), (2, 3, 4), (2,) * 16])
def test_every_code_finds_its_way_through_normal_numbers(bases):
    """float32 tells the quantiles of 65,536 codes apart."""
    every = jnp.arange(np.prod(bases), dtype=jnp.int32)
    z = jax.jit(codes.to_normal, static_argnums=1)(every, bases)
    assert z.shape == (*every.shape, len(bases))
    np.testing.assert_array_equal(jax.jit(codes.of_normal, static_argnums=1)(z, bases), every)


def test_normal_numbers_are_uniform_codes():
    """Of 240,000 draws of 24 codes each has 10,000, of standard deviation 98; and no number is too far out."""
    counts = np.bincount(codes.of_normal(normals(240_000, 3), (2, 3, 4)), minlength=24)
    assert np.abs(counts - 10_000).max() < 400
    np.testing.assert_array_equal(codes.of_normal(jnp.array([[-40.0] * 3, [40.0] * 3]), (2, 3, 4)), [0, 23])


def test_straight_through_has_the_value_of_the_one_and_the_gradient_of_the_other():
    y, z = 1e3 * normals(3, 4), 1e-3 * normals(3, 4, seed=1)
    np.testing.assert_array_equal(jax.jit(codes.straight_through)(y, z), z)
    weight = normals(3, 4, seed=2)
    by_y, by_z = jax.grad(lambda y, z: jnp.sum(weight * codes.straight_through(y, z)), argnums=(0, 1))(y, z)
    np.testing.assert_array_equal(by_y, weight)
    np.testing.assert_array_equal(by_z, np.zeros((3, 4)))
