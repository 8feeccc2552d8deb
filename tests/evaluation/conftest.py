import numpy as np
import pytest

from diffusion_jax.data import digits
from diffusion_jax.evaluation import features
from diffusion_jax.settings import DataSettings


@pytest.fixture(scope="session")
def dataset():
    return digits.build(DataSettings(), "")


@pytest.fixture(scope="session")
def extractor(dataset, own_cache):
    """The digits' features, trained once, in the tests' own cache directory."""
    return features.build(dataset)


@pytest.fixture
def generator():
    return np.random.default_rng(0)
