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
    ("karras(rho=0.02)", 0.02, 0.002, 80.0),
    ("karras(rho=1000.0)", 1000.0, 0.002, 80.0),
])  # fmt: skip
def test_karras_is_a_statement_about_noise_over_signal(schedule, text, rho, low, high):
    """The same sigma / alpha on every schedule that has them."""
    ratio, largest = ratios(text, schedule, 25)
    high = min(high, largest)
    ramp = np.linspace(0.0, 1.0, 25)
    expected = ((1.0 - ramp) * high ** (1 / rho) + ramp * low ** (1 / rho)) ** rho
    np.testing.assert_allclose(ratio, expected, rtol=1e-3)  # t is float32: near 1 that is what a cosine's angle can say


@pytest.mark.parametrize("rho", ["0.001", "1e-9", "1e-300", "1e6"])
def test_karras_overflows_for_no_rho(rho):
    """Towards 0 the largest term of (80^(1/rho) + ...)^rho is all that counts; towards infinity it is a geometric mean.

    80 (1 - r)^rho, up to a relative (0.002 / 80)^(1/rho) that is 0 in float64; 80 (0.002 / 80)^r, up to 1 / rho.
    """
    r, small = np.linspace(0.0, 1.0, 18), float(rho) < 1.0
    expected = 80.0 * ((1.0 - r) ** float(rho) if small else (0.002 / 80.0) ** r)
    sigma = 80.0 * times(f"karras(rho={rho})", "edm", 18)
    np.testing.assert_allclose(sigma[:17], expected[:17], rtol=3e-5)
    np.testing.assert_allclose(sigma[17], 0.002, rtol=1e-5)


@pytest.mark.parametrize("schedule", schedules.EVERY)
@pytest.mark.parametrize("text", [
    "karras(sigma_min=1e-6,sigma_max=1e4)",
    "karras(rho=0.001,sigma_max=1e4)",
    "karras(rho=1e6,sigma_min=1e-6)",
    "logsnr_uniform(logsnr_min=-20.0,logsnr_max=30.0)",
    "shifted(shift=0.001)",
    "shifted(shift=1000.0)",
])  # fmt: skip
def test_the_furthest_ends_are_times(schedule, text):
    t = times(text, schedule, 20)
    assert np.all(np.isfinite(t))
    assert np.all(np.diff(t[:20]) <= 0.0)
    assert t[0] <= 1.0
    assert t[19] > 0.0


@pytest.mark.parametrize("steps", [10, 232, 1000])
def test_equal_steps_of_log_snr_on_ve_are_the_geometric_sequence_of_smld(steps):
    """Song et al. 2021, section 3.1 and appendix B: sigma_i = sigma_min (sigma_max / sigma_min)^((i - 1) / (N - 1))."""
    ratio, _ = ratios(f"logsnr_uniform(logsnr_max={2 * np.log(100.0)})", "ve", steps)
    np.testing.assert_allclose(ratio, np.geomspace(50.0, 0.01, steps), rtol=2e-5)


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


@pytest.mark.parametrize("of", [100, 1000, 4000])
def test_every_number_of_discrete_steps_is_numpys(of):
    """np.linspace(0, T - 1, N).round(), as diffusers has it, and so on; but an exact half goes to the even neighbour.

    Float64 puts some of those halves beside the half. Nothing else is within 1 / 2000 of one, as N is 1000 at most.
    """
    exact = {
        "leading": lambda n: (of // n) * np.arange(n, 0, -1) - of // n,
        "trailing": lambda n: of * np.arange(n, 0, -1) / n - 1.0,
        "linspace": lambda n: np.linspace(0, of - 1, n)[::-1],
    }
    most = min(of, MAX_STEPS)
    for spacing, steps_of in exact.items():
        grid = plugs.build("grid", f"discrete(spacing='{spacing}',of={of})", GRIDS)
        made = jax.jit(jax.vmap(lambda n, grid=grid: grid(None, n)))(jnp.arange(1, most + 1))
        found = of * np.asarray(made, np.float64) - 1.0
        for n in range(1, most + 1):
            wanted, got = steps_of(n), found[n - 1, :n]
            np.testing.assert_allclose(got, np.rint(got), atol=1e-3)
            half = np.abs(wanted % 1.0 - 0.5) < 1e-6
            np.testing.assert_array_equal(np.rint(got)[~half], wanted.round()[~half])
            np.testing.assert_allclose(np.rint(got)[half], wanted[half], atol=0.5 + 1e-6)
            counted = np.rint(got)[half] + (spacing == "trailing")  # which rounds first and takes 1 off then
            assert not np.any(counted % 2)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_discrete_steps_are_the_same_eagerly(spacing):
    grid = plugs.build("grid", f"discrete(spacing='{spacing}')", GRIDS)
    jitted = jax.jit(lambda steps: grid(None, steps))
    for steps in (27, 61, 99, 103, 333, 704):
        both = [1000.0 * np.asarray(make(None, jnp.int32(steps))) for make in (grid, lambda _, n: jitted(n))]
        np.testing.assert_allclose(*both, atol=2e-4)


def test_a_long_process_keeps_its_steps():
    """round(10^6 (n - i) / n) by Python's whole numbers; float32 holds no more than 24 bits of 10^6 times 333."""
    t = times("discrete(of=1000000)", "cosine", 333)[:333].astype(np.float64)
    expected = [round(10**6 * (333 - i) / 333) for i in range(333)]  # 333 is odd: no halves
    np.testing.assert_allclose(1e6 * t, expected, atol=0.1)


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
        "karras(sigma_max=inf)",
        "karras(sigma_max=1e9)",
        "karras(sigma_min=1e-9)",
        "karras(rho=inf)",
        "karras(rho=1e300)",
        "logsnr_uniform(logsnr_min=20.0)",
        "logsnr_uniform(logsnr_max=1e9)",
        "logsnr_uniform(logsnr_min=-inf)",
        "shifted(shift=0.0)",
        "shifted(shift=1e9)",
        "discrete(spacing='quadratic')",
        "discrete(of=0)",
        "discrete(of=1000001)",
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
