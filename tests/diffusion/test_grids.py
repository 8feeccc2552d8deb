"""Time grids: published sigmas, and the shape that every grid keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import plugs
from diffusion_jax.diffusion.grids import GRIDS, MAX_STEPS
from diffusion_jax.diffusion.schedule import SCHEDULES
from diffusion_jax.errors import UserError


def times(grid, schedule, steps):
    schedule = plugs.build("schedule", schedule, SCHEDULES)
    return np.asarray(plugs.build("grid", grid, GRIDS)(schedule, jnp.int32(steps)))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 18, MAX_STEPS])
def test_falls_to_zero_at_the_last_step_and_stays(grid, schedule, steps):
    t = times(grid, schedule, steps)
    assert t.shape == (MAX_STEPS + 1,)
    assert np.all(np.isfinite(t))
    assert t[0] <= 1.0
    assert np.all(np.diff(t[: steps + 1]) < 0.0)
    assert np.all(t[steps:] == 0.0)


def test_karras_sigmas_as_published():
    """18 steps, rho = 7, from 80 to 0.002, then 0 (NVlabs/edm, generate.py; Karras et al. 2022, eq. 5)."""
    sigma = 80.0 * times("karras", "edm", 18)
    np.testing.assert_allclose(sigma[:6], [80.0, 57.58599, 40.78557, 28.37459, 19.35245, 12.91008], rtol=2e-6)
    np.testing.assert_allclose(sigma[16:18], [0.007528, 0.002], rtol=1e-4)
    assert sigma[18] == 0.0


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("text", "rho", "low", "high"), [
    ("karras", 7.0, 0.002, 80.0),
    ("karras(rho=3.0,sigma_min=0.01,sigma_max=50.0)", 3.0, 0.01, 50.0),
])  # fmt: skip
def test_karras_is_a_statement_about_noise_over_signal(schedule, text, rho, low, high):
    """The same sigma / alpha on every schedule."""
    steps = 25
    t = times(text, schedule, steps).astype(np.float64)[:steps]
    with jax.enable_x64(True):
        bound = plugs.build("schedule", schedule, SCHEDULES)
        ratio = np.asarray(bound.sigma(jnp.asarray(t)) / bound.alpha(jnp.asarray(t)))
    ramp = np.linspace(0.0, 1.0, steps)
    expected = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    np.testing.assert_allclose(ratio, expected, rtol=1e-3)  # t is float32: near 1 that is what a cosine's angle can say


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 7, 100])
def test_uniform(schedule, steps):
    np.testing.assert_allclose(
        times("uniform", schedule, steps)[: steps + 1], np.linspace(1.0, 0.0, steps + 1), atol=1e-7
    )


@pytest.mark.parametrize("steps", [1, 7, 100])
def test_quadratic(steps):
    """tau_i proportional to i^2 (Song, Meng & Ermon 2021, appendix D.2)."""
    t = times("quadratic", "cosine", steps)[: steps + 1]
    np.testing.assert_allclose(t, np.linspace(1.0, 0.0, steps + 1) ** 2, atol=1e-6)


@pytest.mark.parametrize("grid", GRIDS)
def test_number_of_steps_is_traced(grid):
    """One trace serves every number of steps, and says what it says eagerly."""
    traces = []

    @jax.jit
    def make(steps):
        traces.append(1)
        return plugs.build("grid", grid, GRIDS)(plugs.build("schedule", "cosine", SCHEDULES), steps)

    for steps in (3, 50):
        np.testing.assert_allclose(make(jnp.int32(steps)), times(grid, "cosine", steps), atol=1e-6)
    assert len(traces) == 1


@pytest.mark.parametrize("options", ["rho=0.0", "sigma_min=0.0", "sigma_min=90.0", "sigma_max=0.001"])
def test_impossible_options_are_refused_by_name(options):
    with pytest.raises(UserError, match="karras"):
        plugs.build("sample.grid", f"karras({options})", GRIDS)
