"""PSNR and SSIM against known values and SciPy's Gaussian filter; the report."""

from types import SimpleNamespace

import numpy as np
import pytest
from scipy import ndimage

from diffusion_jax.evaluation import frechet, reconstruction


def images(count, size, channels=1, seed=0):
    """Smooth ones, so that windows matter."""
    x = np.random.default_rng(seed).uniform(0.0, 255.0, (count, size, size, channels))
    smooth = ndimage.gaussian_filter(x, (0, 1, 1, 0))
    return np.uint8(255.0 * (smooth - smooth.min()) / np.ptp(smooth))


def test_equal_images():
    x = images(3, 16)
    assert np.all(reconstruction.psnr(x, x) == np.inf)
    np.testing.assert_allclose(reconstruction.ssim(x, x), 1.0, rtol=1e-12)


def test_psnr_of_known_errors():
    """An offset of 255 / 5 is 20 log10 5 = 13.98 dB; in half of the pixels only, 10 log10 2 more; black on white 0."""
    x = np.full((2, 4, 4, 3), 100, np.uint8)
    y = x + 51
    y[1, :2] = 100
    np.testing.assert_allclose(reconstruction.psnr(x, y), 20.0 * np.log10(5.0) + np.array([0.0, 10.0 * np.log10(2.0)]))
    black = np.zeros((1, 4, 4, 1), np.uint8)
    np.testing.assert_allclose(reconstruction.psnr(black, black + 255), 0.0, atol=1e-12)


def test_ssim_of_flat_images_is_that_of_their_means():
    """Without variance it is (2 a b + C_1) / (a^2 + b^2 + C_1), C_1 = 6.5025."""
    a, b = (np.full((1, 16, 16, 1), grey, np.uint8) for grey in (60, 120))
    expected = (2.0 * 60.0 * 120.0 + 6.5025) / (60.0**2 + 120.0**2 + 6.5025)
    np.testing.assert_allclose(reconstruction.ssim(a, b), expected, rtol=1e-9)


def by_scipy(x, y):
    """Of one channel each, as skimage's structural_similarity(gaussian_weights=True, use_sample_covariance=False)."""
    mean = lambda a: ndimage.gaussian_filter(a, 1.5, truncate=3.5)[5:-5, 5:-5]
    x, y = np.float64(x), np.float64(y)
    variance, other = mean(x * x) - mean(x) ** 2, mean(y * y) - mean(y) ** 2
    covariance = mean(x * y) - mean(x) * mean(y)
    c1, c2 = 6.5025, 58.5225
    top = (2 * mean(x) * mean(y) + c1) * (2 * covariance + c2)
    return (top / ((mean(x) ** 2 + mean(y) ** 2 + c1) * (variance + other + c2))).mean()


def test_ssim_is_scipy_s():
    x = images(300, 16, 3)
    y = np.uint8(np.clip(x + np.random.default_rng(1).normal(0.0, 40.0, x.shape), 0, 255))
    found = reconstruction.ssim(x, y)
    for i in (0, 255, 256, 299):
        expected = np.mean([by_scipy(x[i, ..., c], y[i, ..., c]) for c in range(3)])
        np.testing.assert_allclose(found[i], expected, rtol=1e-9)
    assert 0.1 < found.mean() < 0.9


@pytest.mark.parametrize(("side", "width"), [(8, 7), (10, 9), (11, 11), (12, 11), (64, 11), (1, 1)])
def test_the_window_is_the_largest_odd_one_that_fits(side, width):
    weights = reconstruction.window(side)
    assert len(weights) == width
    np.testing.assert_allclose(weights.sum(), 1.0)
    if width > 1:
        np.testing.assert_allclose(weights[width // 2 - 1] / weights[width // 2], np.exp(-0.5 / 1.5**2))


def test_the_report_holds_means():
    """Features are the pixels here; an image that comes back exactly counts 100 dB."""
    x = images(20, 12)
    y = x.copy()
    y[1:] = images(20, 12, seed=1)[1:]
    pixels = lambda x: x.reshape(len(x), -1)[:, :5].astype(np.float64)
    features = SimpleNamespace(describe=lambda x: (pixels(x), None))
    report = reconstruction.judge(x, y, features)
    psnr = reconstruction.psnr(x[1:], y[1:])
    np.testing.assert_allclose(report["psnr"], (100.0 + psnr.sum()) / 20.0)
    np.testing.assert_allclose(report["ssim"], reconstruction.ssim(x, y).mean())
    np.testing.assert_allclose(report["frechet"], frechet.distance(pixels(x), pixels(y)))
    assert (report["n"], report["window"]) == (20, 11)
    assert f"{report['psnr']:.2f} dB" in reconstruction.render(report)
