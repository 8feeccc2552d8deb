"""Fixtures of the contract tests."""

import jax
import pytest


@pytest.fixture
def x64():
    """Arithmetic in float64, where an order of convergence can be read off."""
    with jax.enable_x64(True):
        yield
