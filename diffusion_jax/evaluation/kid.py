"""The kernel distance: unbiased squared maximum mean discrepancy with a cubic kernel (Binkowski et al. 2018)."""

import numpy as np

_BLOCK = 2048  # rows of the kernel matrix that are in memory at once


def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """k(x, y) = (x . y / D + 1)^3 between x [N,D] and y [M,D]: [N,M]."""
    return (x @ y.T / x.shape[1] + 1.0) ** 3


def distance(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased estimate between features x [N,D] and y [M,D]; may be negative, and has mean 0 for equal laws."""
    return float(weighted(x, y, np.ones((1, len(x))), np.ones((1, len(y))))[0])


def weighted(x: np.ndarray, y: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The estimate for each of B resamplings, in which x_i stands u_bi times and y_j stands v_bj times.

        MMD^2 = sum_{i != j} u_i u_j k(x_i,x_j) / sum_{i != j} u_i u_j  +  the same of y, v
                - 2 sum_ij u_i v_j k(x_i,y_j) / sum_ij u_i v_j

    A pair of an image with itself never counts, so an image that was drawn twice doesn't bias the estimate.

    Args:
      x: features [N,D].
      y: features [M,D].
      u: counts [B,N].
      v: counts [B,M].

    Returns:
      f64[B].
    """
    x, y, u, v = (np.asarray(array, np.float64) for array in (x, y, u, v))
    cross = _mean(x, y, u, v, np.zeros(len(u)), np.zeros(len(u)))
    return _off_diagonal(x, u) + _off_diagonal(y, v) - 2.0 * cross


def _off_diagonal(x: np.ndarray, u: np.ndarray) -> np.ndarray:
    own = (np.sum(x * x, 1) / x.shape[1] + 1.0) ** 3
    return _mean(x, x, u, u, (u * u) @ own, np.sum(u * u, 1))


def _mean(
    x: np.ndarray, y: np.ndarray, u: np.ndarray, v: np.ndarray, left_out: np.ndarray, pairs_left_out: np.ndarray
) -> np.ndarray:
    total = np.zeros(len(u))
    for start in range(0, len(x), _BLOCK):
        rows = slice(start, start + _BLOCK)
        total += np.sum((u[:, rows] @ kernel(x[rows], y)) * v, 1)
    return (total - left_out) / (u.sum(1) * v.sum(1) - pairs_left_out)
