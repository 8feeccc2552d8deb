"""The Fréchet distance between Gaussians fitted to two sets of features (Dowson & Landau 1982; Heusel et al. 2017)."""

import numpy as np


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Between features a [N,D] and b [M,D], N and M at least 2; at least 0. Biased upward: compare at equal N only."""
    return between(*moments(a), *moments(b))


def moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean [D] and unbiased covariance [D,D] (ddof = 1) of features x [N,D], in float64."""
    x = np.asarray(x, np.float64)
    mean = x.mean(0)
    centred = x - mean
    return mean, centred.T @ centred / (len(x) - 1)


def between(mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray) -> float:
    """The distance between N(mean1 [D], cov1 [D,D]) and N(mean2, cov2); covariances may be singular.

        d^2 = |m1 - m2|^2 + Tr(S1) + Tr(S2) - 2 Tr((S1 S2)^(1/2))
        Tr((S1 S2)^(1/2)) = sum_i sqrt(lambda_i),   lambda = eigenvalues of S1^(1/2) S2 S1^(1/2)

    The right-hand matrix is symmetric and similar to S1 S2: no complex roots, and nothing is added to the diagonal.
    """
    values, vectors = np.linalg.eigh(cov1)
    root = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    middle = root @ cov2 @ root
    eigenvalues = np.linalg.eigvalsh((middle + middle.T) / 2.0)
    cross = np.sqrt(np.maximum(eigenvalues, 0.0)).sum()
    square = np.sum((mean1 - mean2) ** 2) + np.trace(cov1) + np.trace(cov2) - 2.0 * cross
    return float(max(square, 0.0))
