import numpy as np
import pytest
import scipy.linalg

from diffusion_jax.evaluation import frechet


def spd(generator, size, rank=None):
    root = generator.normal(size=(size, rank or size))
    return root @ root.T / size


def by_scipy(mean1, cov1, mean2, cov2):
    return np.sum((mean1 - mean2) ** 2) + np.trace(cov1 + cov2 - 2.0 * scipy.linalg.sqrtm(cov1 @ cov2).real)


@pytest.mark.parametrize("size", [1, 2, 5, 20, 64])
def test_equals_scipys_matrix_root(generator, size):
    mean1, mean2 = generator.normal(size=(2, size))
    cov1, cov2 = spd(generator, size, 2 * size), spd(generator, size, 2 * size)
    expected = by_scipy(mean1, cov1, mean2, cov2)
    np.testing.assert_allclose(frechet.between(mean1, cov1, mean2, cov2), expected, rtol=1e-8)


def test_equals_the_closed_form_of_diagonal_gaussians(generator):
    mean1, mean2 = generator.normal(size=(2, 7))
    s1, s2 = generator.uniform(0.1, 3.0, (2, 7))
    expected = np.sum((mean1 - mean2) ** 2) + np.sum((s1 - s2) ** 2)
    found = frechet.between(mean1, np.diag(s1**2), mean2, np.diag(s2**2))
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_moments_are_unbiased(generator):
    x = generator.normal(size=(9, 4))
    mean, cov = frechet.moments(x.astype(np.float32))
    assert cov.dtype == np.float64
    np.testing.assert_allclose(mean, x.mean(0), rtol=1e-6)
    np.testing.assert_allclose(cov, np.cov(x, rowvar=False, ddof=1), rtol=1e-5, atol=1e-6)


def test_rotations_and_shifts_change_nothing(generator):
    a, b = generator.normal(size=(80, 6)), generator.normal(size=(70, 6)) * 1.7 + 0.3
    rotation, _ = np.linalg.qr(generator.normal(size=(6, 6)))
    np.testing.assert_allclose(frechet.distance(a @ rotation + 5.0, b @ rotation + 5.0), frechet.distance(a, b))
    np.testing.assert_allclose(frechet.distance(a, b), frechet.distance(b, a))


def test_is_zero_for_the_same_images(generator):
    a = generator.normal(size=(100, 8))
    assert frechet.distance(a, a) == pytest.approx(0.0, abs=1e-9)


def test_large_samples_approach_the_closed_form(generator):
    a = generator.normal(size=(200_000, 3)) * [1.0, 2.0, 0.5]
    b = generator.normal(size=(200_000, 3)) * [2.0, 2.0, 1.5] + [1.0, 0.0, -1.0]
    assert frechet.distance(a, b) == pytest.approx(1.0 + 1.0 + 1.0 + 1.0, rel=0.02)


def test_fewer_images_than_features_are_fine(generator):
    a, b = generator.normal(size=(20, 64)), generator.normal(size=(20, 64)) + 2.0
    assert frechet.distance(a, a) == pytest.approx(0.0, abs=1e-6)
    assert np.isfinite(frechet.distance(a, b))
    constant = np.ones((20, 64))
    expected = np.sum((b.mean(0) - 1.0) ** 2) + np.trace(np.cov(b, rowvar=False))
    assert frechet.distance(constant, b) == pytest.approx(expected)


def test_fewer_images_mean_a_larger_distance(generator):
    far = lambda n: np.mean([frechet.distance(*generator.normal(size=(2, n, 16))) for _ in range(10)])
    assert far(50) > 2.0 * far(200) > 4.0 * far(2000)
