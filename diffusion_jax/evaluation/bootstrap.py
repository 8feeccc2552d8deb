"""Bootstrap intervals (Efron & Tibshirani 1993), re-centred on the estimate.

A resampling with replacement holds some images twice, which pushes the Fréchet distance up: the raw percentiles lie
above the estimate itself. Their spread is right and their place is not, so the spread alone is kept.
"""

import numpy as np


def indices(generator: np.random.Generator, size: int, n: int, resamplings: int) -> np.ndarray:
    """`resamplings` draws of `n` of `size` images with replacement: i64[resamplings, n] in [0, size)."""
    return generator.integers(0, size, (resamplings, n))


def counts(index: np.ndarray, size: int) -> np.ndarray:
    """How often each of `size` images stands in each row of index [B,n]: f64[B,size]."""
    return np.stack([np.bincount(row, minlength=size) for row in index]).astype(np.float64)


def interval(resampled: np.ndarray, estimate: float, coverage: float = 0.95) -> tuple[float, float]:
    """The percentile interval of the resampled figures f64[B], moved so that their median falls on `estimate`."""
    tail = 50.0 * (1.0 - coverage)
    low, middle, high = np.percentile(resampled, (tail, 50.0, 100.0 - tail))
    return float(estimate + low - middle), float(estimate + high - middle)
