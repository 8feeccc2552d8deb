"""How many bits a digit costs under Gaussian mixtures, one a class: what a likelihood on the digits has to beat.

    python experiments/digits_mixture.py

Each class has a mixture of its own, fitted to the grey levels 0 to 16 of its training digits with scikit-learn. A level
has the mass of its cell, which is half a level wide to both sides; the cells of 0 and 16 are open. With diagonal
covariances that mass is a product over pixels, and exact. With full ones it has no closed form: there noise of one
level's width is added before fitting, and -log2 density bounds the bits from above (Theis et al. 2016, section 3.1).

Every combination of the number of components, the form of the covariance, what is added to its diagonal and the seed of
the fit is tried, and the best is the one that is best on the held-out digits themselves: no mixture is done injustice.
Cost: half a minute on a CPU core.
"""

import itertools

import numpy as np
from scipy.special import logsumexp
from scipy.stats import norm
from sklearn.mixture import GaussianMixture

from diffusion_jax import data
from diffusion_jax.data.source import ArraySource
from diffusion_jax.settings import DataSettings

COMPONENTS = (1, 2, 4, 6, 8)
ADDED = (0.03, 0.1, 0.3)
"""To the variances, in squared grey levels; those of the noise are 1 / 12."""
SEEDS = (0, 1, 2, 3)
DRAWS = 16  # of the noise, for each digit


def main() -> None:
    """Print a line a combination, and the best."""
    dataset = data.build(DataSettings(name="digits"))
    diagonal = [("diag", *row) for row in itertools.product(COMPONENTS, ADDED, SEEDS)]
    full = [("full", *row) for row in itertools.product((1, 2), ADDED, SEEDS[:1])]
    rows = []
    for form, components, added, seed in diagonal + full:
        bits = bits_per_dimension(dataset.train, dataset.held_out, form, components, added, seed)
        text = f"{form} covariances, {components} components a class, {added} added, seed {seed}"
        rows.append((bits, text))
        print(f"{bits:.3f}  {text}", flush=True)
    print(f"\nbest of {len(rows)}: {{:.3f}} bits per dimension, {{}}".format(*min(rows)))


def bits_per_dimension(
    train: ArraySource, held_out: ArraySource, form: str, components: int, added: float, seed: int
) -> float:
    """The mean over the held-out digits, under the mixture of their own class."""
    nats, draw = 0.0, np.random.default_rng(0)
    for label in range(10):
        seen, unseen = (levels(source)[source.label == label] for source in (train, held_out))
        if form == "full":
            seen, unseen = noisy(seen, draw), noisy(unseen, draw)
        mixture = GaussianMixture(components, covariance_type=form, reg_covar=added, random_state=seed).fit(seen)
        nats -= np.sum(mixture.score_samples(unseen) / DRAWS if form == "full" else log_mass(mixture, unseen))
    return nats / (np.log(2.0) * levels(held_out).size)


def levels(source: ArraySource) -> np.ndarray:
    """Grey levels 0 to 16 of all digits, f64[N,64]."""
    return np.rint((source.image.reshape(len(source), -1) + 1.0) * 8.0)


def log_mass(mixture: GaussianMixture, x: np.ndarray) -> np.ndarray:
    """log P(x) f64[N] of levels x f64[N,64] under a mixture with diagonal covariances."""
    x, means, stds = x[:, None], mixture.means_[None], np.sqrt(mixture.covariances_)[None]
    below = np.where(x > 0.0, (x - 0.5 - means) / stds, -np.inf)
    above = np.where(x < 16.0, (x + 0.5 - means) / stds, np.inf)
    # A cell in the upper tail is the difference of two small numbers there, and of two ones from below.
    mass = np.where(below > 0.0, norm.sf(below) - norm.sf(above), norm.cdf(above) - norm.cdf(below))
    return logsumexp(np.log(np.maximum(mass, 1e-300)).sum(-1) + np.log(mixture.weights_), axis=1)


def noisy(x: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """Levels with noise uniform in [0, 1), each image `DRAWS` times: f64[DRAWS * N, 64]."""
    x = np.repeat(x, DRAWS, axis=0)
    return x + draw.uniform(size=x.shape)


if __name__ == "__main__":
    main()
