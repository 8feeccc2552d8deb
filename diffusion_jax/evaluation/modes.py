"""The modes of the stacked digits: how many of them samples cover, and how evenly.

    m = 100 a + 10 b + c                                the mode of an image, with digits a, b, c in its channels
    covered = number of m with n_m > 0                  n_m of N images have mode m
    KL(p || uniform) = sum_m p_m log(1000 p_m)          p_m = n_m / N, in nats; 0 is even, log 1000 a single mode

The digits' own classifier says what a channel shows (as in Metz et al. 2017, section 3.3.1). It has to say one of ten
digits of whatever it sees, so images that show no digit count as well: read the Fréchet distance beside these figures.

N draws from the uniform distribution itself cover fewer than 1,000 modes, and are not quite even: `expected_covered`
and `expected_kl` are their means.
"""

from typing import Any

import numpy as np
from scipy import stats

from diffusion_jax import data
from diffusion_jax.data.stacked_digits import MODES
from diffusion_jax.errors import require
from diffusion_jax.evaluation import features
from diffusion_jax.evaluation.features import Features
from diffusion_jax.settings import DataSettings


def build_classifier() -> Features:
    """The classifier that evaluation trains on the training digits."""
    return features.build(data.build(DataSettings(name="digits")))


def judge(images: np.ndarray, classifier: Features) -> dict[str, Any]:
    """Measure images u8 or f32 [N,8,8,3], N at least 1.

    Returns:
      A dictionary for JSON: `num_samples`, `covered`, `kl`, and `classifier` {name, hash, fingerprint}.

    Raises:
      UserError: for images of another shape.
    """
    size = classifier.spec.size
    fine = images.ndim == 4 and images.shape[1:] == (size, size, 3) and len(images) > 0
    require(fine, "shape of the samples", images.shape, f"must be (N, {size}, {size}, 3), one digit a channel")
    count = histogram(recognise(images, classifier))
    return {
        "num_samples": len(images),
        "covered": covered(count),
        "kl": kl_to_uniform(count),
        "classifier": classifier.about(),
    }


def recognise(images: np.ndarray, classifier: Features) -> np.ndarray:
    """The digits i32[N,3] that the classifier sees in the channels of images u8 or f32 [N,8,8,3], N at least 1."""
    return np.stack([classifier.predict(images[..., [channel]]) for channel in range(3)], axis=1)


def histogram(digits: np.ndarray) -> np.ndarray:
    """n_m i64[1000], how many of N images with digits i32[N,3] in 0..9 have each mode."""
    return np.bincount(digits @ np.array([100, 10, 1]), minlength=MODES)


def covered(count: np.ndarray) -> int:
    """The number of modes that any image has, of counts n_m i64[1000]."""
    return int(np.count_nonzero(count))


def kl_to_uniform(count: np.ndarray) -> float:
    """sum_m p_m log(1000 p_m) in nats, in [0, log 1000], of counts n_m i64[1000] that are not all 0."""
    p = count[count > 0] / count.sum()
    return float(np.sum(p * np.log(len(count) * p)))


def expected_covered(draws: int) -> float:
    """1000 (1 - (1 - 1/1000)^N), the mean number of modes that N = `draws` uniform draws cover."""
    return MODES * (1.0 - (1.0 - 1.0 / MODES) ** draws)


def expected_kl(draws: int) -> float:
    """1000 E[p log(1000 p)] with N p ~ Binomial(N, 1/1000), the mean divergence of N = `draws` uniform draws.

    About 999 / (2 N) where N is much larger than 1,000.
    """
    n = np.arange(1, draws + 1)
    return float(MODES * np.sum(stats.binom.pmf(n, draws, 1.0 / MODES) * n / draws * np.log(MODES * n / draws)))
