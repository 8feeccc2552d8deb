"""Sizes of scales beside NumPy's loops, and sides that are none."""

import jax
import numpy as np
import pytest

from diffusion_jax.tokenizers import scales
from tests.arrays import normals


@pytest.mark.parametrize("side", [1, 2, 3, 5, 7, 8])
def test_area_is_the_mean_of_each_cell(side):
    """Cells overlap where the side does not divide 8."""
    x = np.asarray(normals(2, 8, 8, 3), np.float64)
    found = jax.jit(scales.area, static_argnums=1)(x.astype(np.float32), side)
    assert found.shape == (2, side, side, 3)
    begin, end = [i * 8 // side for i in range(side)], [int(np.ceil((i + 1) * 8 / side)) for i in range(side)]
    for i, j in np.ndindex(side, side):
        np.testing.assert_allclose(found[:, i, j], x[:, begin[i] : end[i], begin[j] : end[j]].mean((1, 2)), atol=1e-6)


def keys_kernel(s, a=-0.75):
    """Keys 1981, eq. 4 for any a."""
    s = abs(s)
    if s <= 1.0:
        return (a + 2) * s**3 - (a + 3) * s**2 + 1
    return a * s**3 - 5 * a * s**2 + 8 * a * s - 4 * a if s < 2.0 else 0.0


@pytest.mark.parametrize("side", [4, 7, 16])
def test_bicubic_is_the_sum_over_sixteen_neighbours(side):
    x = np.asarray(normals(1, 4, 4, 2), np.float64)
    found = np.asarray(jax.jit(scales.bicubic, static_argnums=1)(x.astype(np.float32), side))
    for i, j in np.ndindex(side, side):
        u, v = ((place + 0.5) * 4 / side - 0.5 for place in (i, j))
        expected = np.zeros(2)
        for p in range(int(np.floor(u)) - 1, int(np.floor(u)) + 3):
            for q in range(int(np.floor(v)) - 1, int(np.floor(v)) + 3):
                weight = keys_kernel(u - p) * keys_kernel(v - q)
                expected += weight * x[0, np.clip(p, 0, 3), np.clip(q, 0, 3)]
        np.testing.assert_allclose(found[0, i, j], expected, atol=1e-5)


@pytest.mark.parametrize("sides", [(), (1,), (2, 4), (1, 2, 2), (1, 4, 2), (1, 2.0)])
def test_other_sides_are_refused(sides):
    with pytest.raises(ValueError, match="scales must rise from 1"):
        scales.check(sides)
