"""Precision and recall (Kynkäänniemi et al. 2019, section 2): how much is real, how much of the real is there."""

import numpy as np

from diffusion_jax.evaluation import neighbours

K = 3
"""Neighbours that span a ball, as in the paper."""


def precision_recall(made: np.ndarray, real: np.ndarray, k: int = K) -> tuple[np.ndarray, np.ndarray]:
    """Which made images lie among the real ones, and which real ones among the made.

    The means of the two are precision and recall. Both depend on the number of images: compare at equal N only.

    Args:
      made: features [N,D], N > k.
      real: features [M,D], M > k.
      k: neighbours that span a ball.

    Returns:
      bool[N], for precision, and bool[M], for recall.
    """
    return inside(made, real, k), inside(real, made, k)


def inside(points: np.ndarray, others: np.ndarray, k: int = K) -> np.ndarray:
    """Which of points [N,D] lie in the manifold that others [M,D] span: bool[N].

    f(p, O) = 1 if |p - o| <= |o - NN_k(o, O)| for at least one o in O, else 0                        (equation 1)
    """
    reach = neighbours.radii(others, k)
    return np.concatenate([np.any(block <= reach[None], 1) for block in neighbours.blocks(points, others)])
