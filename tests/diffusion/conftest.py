"""Fixtures of the diffusion tests."""

import jax
import pytest


@pytest.fixture
def x64():
    """Arithmetic in float64, where an identity can be checked to 12 digits."""
    with jax.enable_x64(True):
        yield
