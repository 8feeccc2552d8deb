import numpy as np
import pytest

from diffusion_jax.evaluation import bootstrap


def test_covers_the_mean_of_a_normal(generator):
    hits = []
    for _ in range(400):
        x = generator.normal(3.0, 2.0, 100)
        index = bootstrap.indices(generator, 100, 100, 200)
        low, high = bootstrap.interval(x[index].mean(1), x.mean())
        hits.append(low < 3.0 < high)
    assert 0.90 <= np.mean(hits) <= 0.98


def test_stands_around_the_estimate_however_biased_the_resampling():
    low, high = bootstrap.interval(np.linspace(10.0, 12.0, 101), 5.0)
    assert (low, high) == pytest.approx((4.05, 5.95))


def test_indices_repeat_with_their_seed():
    first, second = (bootstrap.indices(np.random.default_rng(3), 50, 20, 10) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert first.shape == (10, 20)
    assert 0 <= first.min() <= first.max() < 50


def test_counts():
    np.testing.assert_array_equal(bootstrap.counts(np.array([[0, 0, 3], [1, 2, 3]]), 4), [[2, 0, 0, 1], [0, 1, 1, 1]])
