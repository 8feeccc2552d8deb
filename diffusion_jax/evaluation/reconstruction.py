"""How near reconstructions are to their images: PSNR, SSIM, and the Fréchet distance between the two sets.

    PSNR = 10 log10(255^2 / mean (x - y)^2)                                                        decibels, an image
    SSIM = mean of (2 m_x m_y + C_1)(2 s_xy + C_2) / ((m_x^2 + m_y^2 + C_1)(s_x^2 + s_y^2 + C_2))   in [-1, 1], an image

(Wang et al. 2004, eq. 13 and 17.) m, s^2 and s_xy are means, variances and covariance under a Gaussian window of 11x11
pixels with standard deviation 1.5, at each place where the window lies inside the image; C_1 = (0.01 255)^2 and
C_2 = (0.03 255)^2. Channels are judged one by one, and averaged. In an image of fewer than 11 pixels a side the window
is the largest odd square that fits, so that figures of such images compare among themselves only.

Both images are judged as the data has them: a reconstruction is rounded to the data's grey levels first. Where they are
few (the digits have 17), errors below half a level vanish, and PSNR is higher than that of the unrounded numbers.
"""

from typing import Any

import numpy as np

from diffusion_jax.evaluation import frechet
from diffusion_jax.evaluation.features import Features

WINDOW = 11
DEVIATION = 1.5
C_1, C_2 = (0.01 * 255.0) ** 2, (0.03 * 255.0) ** 2
MOST = 100.0
"""Decibels that an image counts in a mean, at most: one that comes back exactly has infinitely many."""
PART = 256
"""Images whose windows are in memory at once."""


def psnr(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """f64[N] of images u8[N,H,W,C] and their reconstructions, likewise; infinite where they are equal."""
    off = x.astype(np.float64) - y.astype(np.float64)
    with np.errstate(divide="ignore"):
        return 10.0 * np.log10(255.0**2 / np.mean(np.square(off), axis=(1, 2, 3)))


def ssim(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """f64[N] of images u8[N,H,W,C] and their reconstructions, likewise; 1 where they are equal."""
    parts = range(0, len(x), PART)
    return np.concatenate(
        [_ssim(x[i : i + PART].astype(np.float64), y[i : i + PART].astype(np.float64)) for i in parts]
    )


def _ssim(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    m_x, m_y = windowed(x), windowed(y)
    s_x, s_y, s_xy = windowed(x * x) - m_x**2, windowed(y * y) - m_y**2, windowed(x * y) - m_x * m_y
    likeness = (2.0 * m_x * m_y + C_1) * (2.0 * s_xy + C_2) / ((m_x**2 + m_y**2 + C_1) * (s_x + s_y + C_2))
    return likeness.mean(axis=(1, 2, 3))


def windowed(x: np.ndarray) -> np.ndarray:
    """Means of x f64[N,H,W,C] under the window: f64[N,H - w + 1,W - w + 1,C], first along columns, then along rows."""
    weights = window(min(x.shape[1:3]))
    for axis in (1, 2):
        x = np.lib.stride_tricks.sliding_window_view(x, len(weights), axis) @ weights
    return x


def window(side: int) -> np.ndarray:
    """One axis of the window in images of `side` pixels: f64[w] of sum 1, 11 or the largest odd number that fits."""
    reach = (min(WINDOW, side) - 1) // 2
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / DEVIATION) ** 2)
    return weights / weights.sum()


def judge(images: np.ndarray, made: np.ndarray, features: Features) -> dict[str, Any]:
    """Judge reconstructions.

    Args:
      images: u8[N,H,W,C], at least 2.
      made: of each its reconstruction, likewise.
      features: the space of the Fréchet distance.

    Returns:
      For JSON: `psnr` and `ssim`, means over images; `frechet` between the images and their reconstructions; `n`;
      `window`, of SSIM, in pixels.
    """
    described = [features.describe(part)[0] for part in (images, made)]
    return {
        "psnr": float(np.mean(np.minimum(psnr(images, made), MOST))),
        "ssim": float(np.mean(ssim(images, made))),
        "frechet": frechet.distance(*described),
        "n": len(images),
        "window": len(window(min(images.shape[1:3]))),
    }


def render(report: dict[str, Any]) -> str:
    """The report as a line of text, and another where `codes`, `usage`, `usable` and `perplexity` stand in it."""
    quality = (
        f"reconstructions of {report['n']} held-out images: PSNR {report['psnr']:.2f} dB, SSIM {report['ssim']:.4f}, "
        f"Fréchet distance {report['frechet']:.3f}"
    )
    if "codes" not in report:
        return quality
    return (
        f"{quality}\nthey use {report['usage']:.1%} of {report['codes']:,} codes, and so many would use "
        f"{report['usable']:.1%} drawn alike; perplexity {report['perplexity']:.1f}"
    )
