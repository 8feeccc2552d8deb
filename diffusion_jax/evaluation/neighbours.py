"""Distances to near neighbours, block by block, so that no N x M matrix of a large set stands in memory."""

from collections.abc import Iterator

import numpy as np

_BLOCK = 2048


def blocks(a: np.ndarray, b: np.ndarray) -> Iterator[np.ndarray]:
    """Euclidean distances from the rows of a [N,D] to those of b [M,D]: matrices [at most 2048, M], f64, in order."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    norms = np.sum(b * b, 1)
    for start in range(0, len(a), _BLOCK):
        rows = a[start : start + _BLOCK]
        square = np.sum(rows * rows, 1)[:, None] + norms[None] - 2.0 * rows @ b.T
        yield np.sqrt(np.maximum(square, 0.0, out=square), out=square)


def nearest(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The distance from each of a [N,D] to the nearest of b [M,D]: f64[N]."""
    return np.concatenate([block.min(1) for block in blocks(a, b)])


def radii(a: np.ndarray, k: int) -> np.ndarray:
    """The distance from each of a [N,D] to its k-th nearest neighbour among the others, N > k: f64[N]."""
    return np.concatenate([np.partition(block, k, 1)[:, k] for block in blocks(a, a)])  # number 0 is the point itself
