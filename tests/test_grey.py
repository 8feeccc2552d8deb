"""Grey levels: their distance, the nearest one, the noise that fills the space between them, and bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from diffusion_jax import grey


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_levels_are_told_apart(levels):
    """All levels in order, from -1 to 1; what is nearer to one than to its neighbours is that one."""
    image = np.linspace(-1.0, 1.0, levels, dtype=np.float32)
    np.testing.assert_allclose(np.diff(image), grey.step(levels), atol=1e-6)
    for moved in (-0.4, 0.0, 0.4):
        np.testing.assert_array_equal(grey.index(jnp.asarray(image + moved * grey.step(levels)), levels), range(levels))


def test_dequantised_images_fill_their_cells():
    """Uniform within half a level's width; every pixel and image on its own."""
    levels, keys = 17, jax.random.split(jax.random.key(0), 64)
    image = jnp.asarray(np.random.default_rng(0).integers(levels, size=(64, 8, 8, 1)) / 8.0 - 1.0, jnp.float32)
    u = (np.asarray(grey.dequantise(image, keys, levels)) - np.asarray(image)) * 8.0 + 0.5
    assert stats.kstest(u.ravel(), "uniform").pvalue > 0.001
    assert len(np.unique(np.round(u, 5))) > 0.9 * u.size


def test_bits_per_dimension_of_a_fair_choice():
    """One of 8 levels in each of 5 dimensions, all alike: 3 bits."""
    np.testing.assert_allclose(grey.bits_per_dimension(-jnp.log(jnp.float32(8.0**-5)), 5), 3.0, rtol=1e-6)
