"""Time grids: published sigmas, and the shape that every grid keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import plugs
from diffusion_jax.diffusion.grids import GRIDS, MAX_STEPS
from diffusion_jax.errors import UserError
from tests import schedules


def times(grid, schedule, steps):
    schedule = schedules.build(schedule)
    return np.asarray(plugs.build("grid", grid, GRIDS)(schedule, jnp.int32(steps)))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("schedule", schedules.EVERY)
@pytest.mark.parametrize("steps", [1, 2, 18, MAX_STEPS])
def test_falls_to_zero_at_the_last_step_and_stays(grid, schedule, steps):
    t = times(grid, schedule, steps)
    assert t.shape == (MAX_STEPS + 1,)
    assert np.all(np.isfinite(t))
    assert t[0] <= 1.0
    assert t[steps - 1] > 0.0
    assert np.all(np.diff(t[: steps + 1]) < 0.0)
    assert np.all(t[steps:] == 0.0)


def test_karras_sigmas_as_published():
    """18 steps, rho = 7, from 80 to 0.002, then 0 (NVlabs/edm, generate.py; Karras et al. 2022, eq. 5)."""
    sigma = 80.0 * times("karras", "edm", 18)
    np.testing.assert_allclose(sigma[:6], [80.0, 57.58599, 40.78557, 28.37459, 19.35245, 12.91008], rtol=2e-6)
    np.testing.assert_allclose(sigma[16:18], [0.007528, 0.002], rtol=1e-4)
    assert sigma[18] == 0.0


def ratios(text, schedule, steps):
    """sigma / alpha at the stops above 0, in float64, and at t = 1."""
    t = times(text, schedule, steps).astype(np.float64)[:steps]
    with jax.enable_x64(True):
        bound, t = schedules.build(schedule), jnp.asarray(np.append(t, 1.0))
        ratio = np.asarray(bound.sigma(t) / bound.alpha(t))
    return ratio[:-1], ratio[-1]


@pytest.mark.parametrize("schedule", schedules.EVERY)
@pytest.mark.parametrize(("text", "rho", "low", "high"), [
    ("karras", 7.0, 0.002, 80.0),
    ("karras(rho=3.0,sigma_min=0.01,sigma_max=50.0)", 3.0, 0.01, 50.0),
])  # fmt: skip
def test_karras_is_a_statement_about_noise_over_signal(schedule, text, rho, low, high):
    """The same sigma / alpha on every schedule that has them."""
    ratio, largest = ratios(text, schedule, 25)
    high = min(high, largest)
    ramp = np.linspace(0.0, 1.0, 25)
    expected = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    np.testing.assert_allclose(ratio, expected, rtol=1e-3)  # t is float32: near 1 that is what a cosine's angle can say


@pytest.mark.parametrize("schedule", schedules.EVERY)
@pytest.mark.parametrize(("text", "low", "high"), [
    ("logsnr_uniform", -2.0 * np.log(80.0), -2.0 * np.log(0.002)),
    ("logsnr_uniform(logsnr_min=-4.0,logsnr_max=9.0)", -4.0, 9.0),
])  # fmt: skip
def test_logsnr_uniform_has_equal_steps(schedule, text, low, high):
    ratio, largest = ratios(text, schedule, 25)
    low = max(low, -2.0 * np.log(largest))
    np.testing.assert_allclose(-2.0 * np.log(ratio), np.linspace(low, high, 25), atol=1e-3)


@pytest.mark.parametrize("name", ["ve", "scaled_linear"])
@pytest.mark.parametrize("grid", ["karras", "logsnr_uniform"])
def test_less_noise_than_the_grid_asks_for_is_taken_as_it_is(grid, name):
    """sigma / alpha ends at 50 and at 14.6: the grid starts there, not with several stops at t = 1."""
    t = times(grid, name, 10)
    np.testing.assert_allclose(t[0], 1.0, atol=1e-6)
    assert t[1] < 0.99


@pytest.mark.parametrize("schedule", schedules.EVERY)
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


@pytest.mark.parametrize("steps", [1, 7, 100])
def test_cosine(steps):
    """The Chebyshev-Lobatto points cos(pi i / n) of [-1, 1], moved to [0, 1]."""
    t = times("cosine", "cosine", steps)[: steps + 1]
    np.testing.assert_allclose(t, (1.0 + np.cos(np.pi * np.arange(steps + 1) / steps)) / 2.0, atol=1e-6)


@pytest.mark.parametrize("shift", [0.5, 3.0])
def test_shifted_grid_on_the_flow_is_the_uniform_grid_on_the_shifted_flow(shift):
    """Esser et al. 2024, eq. 23: at equal sigma a shift may be the schedule's or the grid's."""
    t = times(f"shifted(shift={shift})", "rectified_flow", 20)[:21]
    schedule = schedules.build(f"resolution_shifted(of='rectified_flow',shift={shift})")
    np.testing.assert_allclose(t, schedule.sigma(jnp.asarray(np.linspace(1.0, 0.0, 21, dtype=np.float32))), atol=1e-6)


def spaced(spacing, n, of):
    """Lin et al. 2023, Table 2, as NumPy has it; steps counted from 0."""
    return {
        "leading": lambda: (np.arange(n) * (of // n))[::-1],
        "trailing": lambda: np.round(np.arange(of, 0, -of / n)) - 1,
        "linspace": lambda: np.round(np.linspace(0, of - 1, n))[::-1],
    }[spacing]()


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize(
    ("of", "steps"),
    [*((1000, n) for n in (1, 2, 7, 10, 18, 30, 50, 999, 1000)), (100, 30), (100, 100), (250, 99), (4000, 1000)],
)
def test_discrete_spacings(spacing, of, steps):
    """On the discrete schedule of as many steps, and down to 0: every one of them where there are as many."""
    t = times(f"discrete(spacing='{spacing}',of={of})", f"ddpm_linear(steps={of})", steps)
    np.testing.assert_allclose(of * t[:steps].astype(np.float64) - 1.0, spaced(spacing, steps, of), atol=1e-3)
    assert not np.any(t[steps:])


def test_a_discrete_process_has_no_more_stops_than_steps():
    assert {of: plugs.build("grid", f"discrete(of={of})", GRIDS).most for of in (100, 4000)} == {100: 100, 4000: 1000}
    t = times("discrete(of=100)", "cosine", 400)
    np.testing.assert_allclose(t[:401], np.linspace(1.0, 0.0, 401), atol=1e-6)


def test_published_discrete_spacings():
    """Lin et al. 2023, Table 2: T = 1000 in 10 steps, there counted from 1."""
    steps = lambda spacing: np.round(1000.0 * times(f"discrete(spacing='{spacing}')", "ddpm_linear", 10)[:10]).tolist()
    assert steps("leading") == [901, 801, 701, 601, 501, 401, 301, 201, 101, 1]
    assert steps("linspace") == [1000, 889, 778, 667, 556, 445, 334, 223, 112, 1]
    assert steps("trailing") == [1000, 900, 800, 700, 600, 500, 400, 300, 200, 100]


def test_custom_is_the_list():
    grid = plugs.build("sample.grid", "custom(times=(1.0,0.7,0.3))", GRIDS)
    assert grid.steps == 3
    np.testing.assert_allclose(times("custom(times=(1.0,0.7,0.3))", "edm", 3)[:5], [1.0, 0.7, 0.3, 0.0, 0.0], rtol=1e-6)
    assert {name for name in GRIDS if plugs.build("grid", name, GRIDS).steps is not None} == {"custom"}


def test_custom_in_other_numbers_of_steps_stays_on_its_line():
    t = times("custom(times=(1.0,0.7,0.3))", "edm", 6)
    np.testing.assert_allclose(t[:7], [1.0, 0.85, 0.7, 0.5, 0.3, 0.15, 0.0], rtol=1e-6)


@pytest.mark.parametrize("grid", GRIDS)
def test_number_of_steps_is_traced(grid):
    """One trace serves every number of steps, and says what it says eagerly."""
    traces = []

    @jax.jit
    def make(steps):
        traces.append(1)
        return plugs.build("grid", grid, GRIDS)(schedules.build("cosine"), steps)

    for steps in (3, 50):
        np.testing.assert_allclose(make(jnp.int32(steps)), times(grid, "cosine", steps), atol=1e-6)
    assert len(traces) == 1


@pytest.mark.parametrize(
    "text",
    [
        "karras(rho=0.0)",
        "karras(sigma_min=0.0)",
        "karras(sigma_min=90.0)",
        "karras(sigma_max=0.001)",
        "logsnr_uniform(logsnr_min=20.0)",
        "shifted(shift=0.0)",
        "discrete(spacing='quadratic')",
        "discrete(of=0)",
        "custom(times=())",
        "custom(times=(1.0,1.0))",
        "custom(times=(0.3,0.7))",
        "custom(times=(1.0,0.0))",
        "custom(times=(1.5,0.5))",
        "custom(times=('a',))",
    ],
)
def test_impossible_options_are_refused_by_name(text):
    with pytest.raises(UserError, match=text.split("(")[0]):
        plugs.build("sample.grid", text, GRIDS)
