"""What every solver promises, on data whose ideal denoiser is known in closed form.

A new row of `SOLVERS` joins by being registered; `PROMISES` must then say what it promises.
"""

import functools
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from diffusion_jax import plugs, rng
from diffusion_jax.diffusion.grids import GRIDS
from diffusion_jax.diffusion.solvers import SOLVERS, dormand_prince, draws_noise
from diffusion_jax.diffusion.solvers.base import reverse, solve
from diffusion_jax.errors import UserError
from diffusion_jax.types import Denoised
from tests.contracts import papers_ode as papers
from tests.contracts.closed_form import (
    FINITE,
    GAUSSIAN,
    POINT,
    ROWS,
    TWO,
    Picked,
    between,
    curves,
    logsnr_grid,
    mixture,
    order,
    order_on_pixels,
    place,
    run,
    slope,
    transported,
)
from tests.schedules import SORTS

pytestmark = pytest.mark.usefixtures("quick_compilation")

# ------------------------------------------------------------------------------------------ the promises


THREE = ("vp_linear", "edm", "rectified_flow")
FOUR = (*THREE, "learned")
STRAIGHT = ("edm", "rectified_flow")
"""Whose alpha and sigma are linear in t."""
VARIANCE_PRESERVING = ("vp_linear", "cosine")
CORE = ("vp_linear", "cosine", "edm", "rectified_flow")


@dataclass(frozen=True, kw_only=True)
class Promise:
    """What is known of a solver from its paper.

    Attributes:
      order: of convergence on the probability-flow ODE; None for a stochastic or an adaptive solver.
      evaluations: number of steps -> calls of the denoiser down to t = 0; None for an adaptive solver.
      reference: the paper's run in NumPy, (Gaussian, x, times) -> x at the end; None where it has no statement that
        differs from ours.
      stated_for: the schedules that the paper's step is stated for.
      zigzag: the order on a grid of steps 1 : 3 : 1 : 3, where that is another.
      encoding: the order from the image to the noise, where that is another: there the start by lower orders counts.
      pixels: schedule -> the slope on correlated pixels, where the start by lower orders is what is left of the error.
      finite: the slope on a finite data set, where the start counts too.
      framed: it steps in the straight frame, and so takes another way on every schedule.
      tolerance: how far the slopes may be off.
    """

    order: int | None = None
    evaluations: Callable[[int], int] | None
    reference: Callable | None = None
    stated_for: tuple[str, ...] = CORE
    zigzag: int | None = None
    encoding: int | None = None
    pixels: Mapping[str, float] = field(default_factory=dict)
    finite: float | None = None
    framed: bool = False
    tolerance: float = 0.12


PROMISES = {
    # Song, Meng & Ermon 2021, eq. 12; order 1: Lu et al. 2022 (DPM-Solver), section 4.1: DDIM is DPM-Solver-1
    "ddim": Promise(order=1, evaluations=lambda n: n, reference=papers.ddim),
    "euler": Promise(order=1, evaluations=lambda n: n, reference=papers.euler, stated_for=STRAIGHT, framed=True),
    # Karras et al. 2022, algorithm 1: order 2, 2 n - 1 evaluations: "NFE = 35" for their 18 steps (Table 2)
    "heun": Promise(order=2, evaluations=lambda n: 2 * n - 1, reference=papers.heun, stated_for=STRAIGHT, framed=True),
    # Lu et al. 2022, theorem 3.2: order 3
    "dpm_solver_3": Promise(order=3, evaluations=lambda n: 3 * n - 2, reference=papers.dpm_solver_3),
    # Lu et al. 2022b, theorem 5.1 and the text below it: order 2
    "dpmpp_2s": Promise(order=2, evaluations=lambda n: 2 * n - 1, reference=papers.dpmpp_2s),
    "dpmpp_2m": Promise(order=2, evaluations=lambda n: n, reference=papers.dpmpp_2m),
    # as published it measures 2.03, with the last term doubled 2.9 to 3.7
    "dpmpp_3m": Promise(order=2, evaluations=lambda n: n, reference=papers.dpmpp_3m),
    "exponential_3m": Promise(
        order=3, evaluations=lambda n: n, reference=papers.exponential_3m, encoding=2, tolerance=0.25
    ),
    # Zhao et al. 2023, theorem 3.1: p + 1
    "unipc": Promise(order=3, evaluations=lambda n: n, reference=papers.unipc(2), tolerance=0.2),
    "unipc(order=3)": Promise(
        order=4, evaluations=lambda n: n, reference=papers.unipc(3), encoding=3, finite=3.45, tolerance=0.2
    ),
    # Hairer et al. 1993, III.5: as many as slopes
    "lms(order=1)": Promise(
        order=1, evaluations=lambda n: n, reference=papers.adams_bashforth(1), stated_for=STRAIGHT, framed=True
    ),
    "lms(order=2)": Promise(
        order=2, evaluations=lambda n: n, reference=papers.adams_bashforth(2), stated_for=STRAIGHT, framed=True
    ),
    # begun by orders 1, 2 (and 3), as in k-diffusion: what they leave is of order 2, and shows from 1e-7 or 1e-8 down,
    # most on pixels of large variance; `test_what_limits_lms_is_its_start` begins in more noise, and there it does not
    "lms(order=3)": Promise(
        order=3,
        evaluations=lambda n: n,
        reference=papers.adams_bashforth(3),
        stated_for=STRAIGHT,
        framed=True,
        encoding=2,
        tolerance=0.6,
    ),
    "lms": Promise(
        order=4,
        evaluations=lambda n: n,
        reference=papers.adams_bashforth(4),
        stated_for=STRAIGHT,
        framed=True,
        encoding=2,
        pixels=dict.fromkeys(("vp_linear", "rectified_flow", "learned"), 2.7),
        tolerance=0.6,
    ),
    # with constant weights it falls to order 1 on a zig-zag grid only
    "pndm": Promise(order=2, evaluations=lambda n: n, reference=papers.plms, zigzag=1),
    "rk45(rtol=1e-5,atol=1e-5)": Promise(evaluations=None),
    # stochastic: their laws are looked at in test_stochastic.py
    "ddim(eta=0.5)": Promise(evaluations=lambda n: n),
    "ddim(eta=1.0)": Promise(evaluations=lambda n: n),
    "ddpm": Promise(evaluations=lambda n: n),
    "ddpm(variance=1.0)": Promise(evaluations=lambda n: n),
    "euler_ancestral": Promise(evaluations=lambda n: n),
    "edm": Promise(evaluations=lambda n: 2 * n - 1),
    "sde_dpmpp_2m": Promise(evaluations=lambda n: n),
    "euler_maruyama": Promise(evaluations=lambda n: n),
    "flow_sde": Promise(evaluations=lambda n: n),
    "predictor_corrector": Promise(evaluations=lambda n: 2 * n - 1),
    "predictor_corrector(corrections=2)": Promise(evaluations=lambda n: 3 * n - 2),
}

ADAPTIVE = ("rk45(rtol=1e-5,atol=1e-5)",)
FIXED = [text for text, promise in PROMISES.items() if promise.order]
ODE = [*FIXED, *ADAPTIVE]
SDE = [text for text in PROMISES if text not in ODE]


TYPICAL = {"ddim", "heun", "dpmpp_2m", "unipc", "ddpm", "edm", "sde_dpmpp_2m"}
"""One of each sort: the rows of what is slow and hardly differs from solver to solver; all of them with -m slow."""


def typical(texts):
    return [pytest.param(text, marks=[] if text in TYPICAL else pytest.mark.slow) for text in texts]


def test_every_solver_makes_its_promises():
    assert {plugs.parse("", text)[0] for text in PROMISES} == set(SOLVERS)


@pytest.mark.parametrize("text", PROMISES)
def test_which_solvers_can_encode(text):
    """Those that draw no noise; `test_only_stochastic_solvers_look_at_keys` sees which do."""
    assert draws_noise(plugs.build("solver", text, SOLVERS)) == (text in SDE)


# ------------------------------------------------------------------------------------------ order


@pytest.mark.parametrize("zigzag", [False, True], ids=["regular", "zigzag"])
@pytest.mark.parametrize("data", [GAUSSIAN, TWO], ids=["gaussian", "mixture"])
@pytest.mark.parametrize("name", FOUR)
@pytest.mark.parametrize("text", FIXED)
def test_order_of_convergence(text, name, data, zigzag, x64):
    """The slope of log(error) over log(steps), to the exact flow."""
    promise = PROMISES[text]
    promised = (zigzag and promise.zigzag) or promise.order
    found, errors = order(text, name, data, zigzag=zigzag)
    assert abs(found - promised) < promise.tolerance, (found, errors)
    assert errors[-1] < {1: 2e-2, 2: 2e-4}.get(promised, 1e-5)


@pytest.mark.parametrize("name", FOUR)
@pytest.mark.parametrize("text", FIXED)
def test_order_of_encoding(text, name, x64):
    """From the image to the noise with the same step function: to the exact flow, and back to the image."""
    promise, counts = PROMISES[text], (64, 128, 256, 512)
    promised = promise.encoding or promise.order
    found, errors = order(text, name, TWO, encode=True)
    assert abs(found - promised) < max(promise.tolerance, 0.2), (found, errors)
    x, returned = np.array([-0.9, -0.5, 0.3, 0.8]), []
    for n in counts:
        times = logsnr_grid(name, n, high=40.0, low=0.05)
        noise = run(text, name, TWO, times[::-1], x)
        returned.append(np.abs(run(text, name, TWO, times, noise) - x).mean())
    assert slope(counts, returned) > promised - 0.3, returned
    assert returned[-1] < {1: 2e-2, 2: 2e-4}.get(promised, 1e-5)


@pytest.mark.parametrize("name", FOUR)
@pytest.mark.parametrize("text", FIXED)
def test_order_on_a_finite_data_set(text, name, x64):
    """Two points, whose ideal denoiser is a softmax over their distances."""
    promise = PROMISES[text]
    found, errors = order(text, name, FINITE)
    assert abs(found - (promise.finite or promise.order)) < max(promise.tolerance, 0.2), (found, errors)


@pytest.mark.parametrize("name", FOUR)
@pytest.mark.parametrize("text", typical(FIXED))
def test_order_on_correlated_pixels(text, name, x64):
    """A Gaussian whose covariance is no multiple of the identity: x is a vector here, and no number is its own."""
    promise = PROMISES[text]
    found, errors = order_on_pixels(text, name)
    if name in promise.pixels:
        assert abs(found - promise.pixels[name]) < 0.2, (found, errors)
        assert errors[-1] < 1e-7
    else:
        assert abs(found - promise.order) < max(promise.tolerance, 0.2), (found, errors)


def test_what_limits_lms_is_its_start(x64):
    """From sigma / alpha = 1000, where nothing that its three first steps do is left in the end, it is of order 4."""
    found, errors = order_on_pixels("lms", "rectified_flow", high=1000.0)
    assert abs(found - 4.0) < 0.2, (found, errors)


@pytest.mark.parametrize("tolerance", [1e-4, 1e-6, 1e-8])
@pytest.mark.parametrize("encode", [False, True], ids=["decode", "encode"])
@pytest.mark.parametrize("name", THREE)
def test_rk45_meets_its_tolerance(name, encode, tolerance, x64):
    """In one step of the grid, and in five: it finds its own parts.

    The tolerance is each part's; between the data's two modes the flow multiplies an early error by some 60.
    """
    for steps in (1, 5):
        times = logsnr_grid(name, steps)[:: -1 if encode else 1]
        x, truth = between(name, float(times[0]), float(times[-1]), TWO)
        error = np.abs(run(f"rk45(rtol={tolerance},atol={tolerance})", name, TWO, times, x) - truth)
        spread = np.hypot(*curves(name, float(times[-1])))
        assert np.all(error < 100 * tolerance * (1.0 + spread)), (steps, error)
        assert error.max() > 1e-4 * tolerance  # it is the tolerance that is at work


def test_rk45_has_the_table_of_dormand_and_prince():
    """SciPy's, typed in by others."""
    theirs = integrate.RK45
    np.testing.assert_allclose(dormand_prince.NODES, [*theirs.C[1:], 1.0])
    stages = np.array(dormand_prince.STAGES, float)
    np.testing.assert_allclose(stages[:5, :5], theirs.A[1:])
    np.testing.assert_allclose(stages[5, :6], theirs.B)
    assert not np.any(np.triu(stages[:, 1:]))
    np.testing.assert_allclose(dormand_prince.ERROR, -theirs.E)


# ------------------------------------------------------------------------------------------ exact maps


@pytest.mark.parametrize("name", CORE)
@pytest.mark.parametrize("text", ODE)
def test_map_of_the_gaussian_ode(text, name, x64):
    """x_t - alpha_t mu grows by the ratio of the standard deviations (alpha^2 s^2 + sigma^2)^1/2; linear in x."""
    times = logsnr_grid(name, 1000, low=0.002)
    (a, b), (c, d) = curves(name, times[0]), curves(name, times[-1])
    x = a * 0.4 + b * np.array([-2.0, -1.0, 0.0, 2.0])
    expected = c * 0.4 + (x - a * 0.4) * np.hypot(c * 0.5, d) / np.hypot(a * 0.5, b)
    got = run(text, name, GAUSSIAN, times, x)
    np.testing.assert_allclose(got, expected, atol={1: 0.02, 2: 2e-4}.get(PROMISES[text].order, 1e-5))
    np.testing.assert_allclose(got[3] - got[2], 2.0 * (got[2] - got[1]), rtol=1e-9)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        pytest.param(text, name, marks=[] if name in SORTS or text in ("ddim", "ddpm") else pytest.mark.slow)
        for text, name in itertools.product(PROMISES, ROWS)
    ],
)
def test_a_single_point_is_reached_in_three_steps(text, name, x64):
    """All flow lines end in the point, and on them x0 and eps stand still: the steps may be as uneven as they like."""
    alpha, sigma = curves(name, 1.0)
    x = alpha * 0.37 + sigma * np.array([-1.5, -0.2, 0.6, 2.0])
    np.testing.assert_allclose(run(text, name, POINT, [1.0, 0.55, 0.2, 0.0], x), 0.37, atol=1e-9)
    if text in ODE:  # and every stop between lies on the line
        (a, b), (c, d) = curves(name, 1.0), curves(name, 0.2)
        expected = c * 0.37 + d * (x - a * 0.37) / b
        np.testing.assert_allclose(run(text, name, POINT, [1.0, 0.55, 0.2], x), expected, rtol=1e-9)
        # and upwards, to the pure noise
        np.testing.assert_allclose(run(text, name, POINT, [0.2, 0.55, 1.0], expected), x, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    ("text", "name"), [(t, n) for t in FIXED if PROMISES[t].reference for n in PROMISES[t].stated_for]
)
def test_seven_steps_as_the_paper_writes_them(text, name, x64):
    """Uneven ones: a step ratio upside down, or one stop mistaken for the next, would show."""
    times = [0.9, 0.75, 0.68, 0.4, 0.33, 0.15, 0.06, 0.0]
    x = curves(name, 0.9)[1] * np.array([-1.5, 0.1, 0.7, 1.2])
    for stop in (4, 7, 8):
        expected = PROMISES[text].reference(papers.Gaussian(name), x, times[:stop])
        np.testing.assert_allclose(run(text, name, GAUSSIAN, times[:stop], x), expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("text", typical(t for t in FIXED if not PROMISES[t].framed))
def test_one_grid_of_logsnr_is_one_run_whatever_the_schedule(text, x64):
    """In x / alpha these methods know log-SNR alone (Lu et al. 2022, section 3.1; Karras et al. 2022, section 2)."""
    ends = []
    for name in ROWS:
        times = logsnr_grid(name, 6, high=10.0, zigzag=True)
        alpha, _ = curves(name, times)
        ends.append(run(text, name, TWO, times, alpha[0] * np.array([-12.0, -3.0, 0.5, 8.0])) / alpha[-1])
    np.testing.assert_allclose(ends, np.broadcast_to(ends[0], np.shape(ends)), rtol=1e-8)


@pytest.mark.parametrize("steps", [1, 2, 5, 20])
def test_ddim_on_white_noise_over_equal_angles(steps, x64):
    """For N(0, I) a step by the angle d multiplies x by cos(d): after N steps cos(pi / 2N)^N, not 1."""
    white = ((0.0, 0.0), (1.0, 1.0), (0.5, 0.5))
    times = np.linspace(1.0, 0.0, steps + 1)
    theta = np.arctan2(*curves("cosine", 1.0)[::-1])
    got = run("ddim", "cosine", white, times, np.array([-1.0, 2.0]))
    np.testing.assert_allclose(got, np.array([-1.0, 2.0]) * np.cos(theta / steps) ** steps, rtol=1e-9)
    assert abs(theta - np.pi / 2) < 5e-5  # our cosine ends at log-SNR -20
    np.testing.assert_allclose(got[1], 2.0 * np.cos(np.pi / 2 / steps) ** steps, atol=2e-4)


# ------------------------------------------------------------------------------------------ noise


@functools.cache
def one_step(name):
    """(eta, t, s, x, x0) -> DDIM's step from a stated x and x0, on 4,096 keys."""
    schedule = ROWS[name]
    keys = rng.example_keys(jax.random.key(0), jnp.arange(4096))

    def step(eta, t, s, x, x0):
        denoise = lambda x, t: Denoised(jnp.full_like(x, x0), (x - schedule.alpha(t) * x0) / schedule.sigma(t))
        return SOLVERS["ddim"](eta=eta).step(denoise, schedule, jnp.full((4096, 1, 1, 1), x), t, s, (), keys)[0]

    compiled = jax.jit(step)
    return lambda *numbers: np.asarray(compiled(*map(jnp.float64, numbers))).reshape(-1)


@pytest.mark.parametrize("name", VARIANCE_PRESERVING)
@pytest.mark.parametrize(("t", "s"), [(1.0, 0.8), (0.8, 0.5), (0.5, 0.45), (0.2, 0.01), (0.1, 0.0)])
def test_ddim_with_eta_one_is_ddpm(name, t, s, x64):
    """The posterior q(x_s | x_t, x0) of Ho et al. 2020, eq. 6 and 7, in alpha-bar and beta.

    The mean exactly, by the same keys at x = x0 = 0, which leave the noise alone; the noise by its distribution.
    """
    bar_t, bar_s = (curves(name, u)[0] ** 2 for u in (t, s))
    beta = 1.0 - bar_t / bar_s
    mean = np.sqrt(bar_s) * beta / (1 - bar_t) * 0.8 + np.sqrt(bar_t / bar_s) * (1 - bar_s) / (1 - bar_t) * 1.7
    variance = (1 - bar_s) / (1 - bar_t) * beta
    noise = one_step(name)(1.0, t, s, 0.0, 0.0)
    np.testing.assert_allclose(one_step(name)(1.0, t, s, 1.7, 0.8) - noise, mean, rtol=1e-9, atol=1e-12)
    if s == 0.0:
        np.testing.assert_array_equal(noise, 0.0)
    else:
        assert stats.kstest(noise / np.sqrt(variance), "norm").pvalue > 0.001
        np.testing.assert_allclose(noise.std(), np.sqrt(variance), rtol=4 / np.sqrt(2 * len(noise)))


def ddim_variance(name, eta, times, s2):
    """The variance of DDIM's samples of N(0, s2): v <- c^2 v + noise^2 (Song, Meng & Ermon 2021, eq. 12 and 16)."""
    alpha, sigma = curves(name, times)
    v = sigma[0] ** 2
    for alpha_t, sigma_t, alpha_s, sigma_s in zip(alpha[:-1], sigma[:-1], alpha[1:], sigma[1:], strict=True):
        total = alpha_t**2 * s2 + sigma_t**2
        noise2 = eta**2 * sigma_s**2 / sigma_t**2 * (1 - alpha_t**2 / alpha_s**2)
        if name not in VARIANCE_PRESERVING:
            noise2 = eta**2 * (sigma_s**2 - (alpha_t / alpha_s) ** 2 * sigma_s**4 / sigma_t**2)
        v = (alpha_s * alpha_t * s2 / total + np.sqrt(sigma_s**2 - noise2) * sigma_t / total) ** 2 * v + noise2
    return v


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("name", CORE)
def test_ddim_variance_is_that_of_the_linear_recursion(name, eta, x64):
    """At the end of 8 steps to t = 0, and of their first 4; 16,384 samples, tolerance 4 standard errors (4.4 %)."""
    count, s2 = 16384, 0.25
    data = ((0.0, 0.0), (0.5, 0.5), (0.5, 0.5))
    times = np.append(logsnr_grid(name, 7, low=0.05), 0.0)
    x = curves(name, times[0])[1] * stats.norm.ppf((np.arange(count) + 0.5) / count)
    for stop in (4, 8):
        got = run(f"ddim(eta={eta})", name, data, times[: stop + 1], x).var()
        expected = ddim_variance(name, eta, times[: stop + 1], s2)
        np.testing.assert_allclose(got, expected, rtol=4 * np.sqrt(2 / count))
    # the test can tell: without noise, or with all of it, the variance would be another
    wrong = ddim_variance(name, 1.0 - eta if eta in (0.0, 1.0) else 0.0, times, s2)
    assert abs(wrong / ddim_variance(name, eta, times, s2) - 1.0) > 0.01


def test_ancestral_sampling_converges_to_the_variance_of_the_data(x64):
    """From below: with DDPM's betas and s^2 = 0.25 measured elsewhere as .2360 in 250 steps and .2461 in 1000.

    Samples of 250 steps are told from the variance that the other choice, beta, would give (.2533).
    """
    for steps, published in ((250, 0.2360), (1000, 0.2461)):
        got = ddim_variance("vp_linear", 1.0, np.linspace(1.0, 0.0, steps + 1), 0.25)
        np.testing.assert_allclose(got, published, rtol=1e-3)
    count = 8192
    x = curves("vp_linear", 1.0)[1] * stats.norm.ppf((np.arange(count) + 0.5) / count)
    samples = run("ddim(eta=1.0)", "vp_linear", ((0.0, 0.0), (0.5, 0.5), (0.5, 0.5)), np.linspace(1.0, 0.0, 251), x)
    np.testing.assert_allclose(samples.var(), 0.2360, rtol=3 * np.sqrt(2 / count))


@pytest.mark.parametrize("text", typical(PROMISES))
def test_only_stochastic_solvers_look_at_keys(text, x64):
    x = np.linspace(-1.0, 1.0, 5)
    first, second = (run(text, "cosine", TWO, logsnr_grid("cosine", 6), x, key) for key in (0, 1))
    assert np.array_equal(first, second) == (text in ODE)


@pytest.mark.parametrize("text", typical(SDE))
def test_an_image_depends_on_its_own_key_and_start(text, x64):
    times = logsnr_grid("vp_linear", 6)
    whole = run(text, "vp_linear", TWO, times, np.array([0.3, 0.3, -0.5]))
    other = run(text, "vp_linear", TWO, times, np.array([0.3, 5.0, -0.5]))
    assert whole[0] != whole[1]  # same start, different keys
    np.testing.assert_allclose(other[[0, 2]], whole[[0, 2]], rtol=1e-12)


# ------------------------------------------------------------------------------------------ the machine


@pytest.mark.parametrize("text", [text for text in PROMISES if text not in ADAPTIVE])
@pytest.mark.parametrize("steps", [1, 2, 18])
def test_number_of_evaluations(text, steps):
    """Counted as they happen: without jit the branches that are not taken are not run. EDM's Heun, 18 steps: 35."""
    schedule, calls = ROWS["edm"], []

    def denoise(x, t):
        assert float(t) > 0.0
        calls.append(float(t))
        return Denoised(0.5 * x, 0.1 * x)

    times, keys = GRIDS["karras"]()(schedule, jnp.int32(steps)), rng.example_keys(jax.random.key(0), jnp.arange(1))
    solver = plugs.build("solver", text, SOLVERS)
    with jax.disable_jit():
        solve(denoise, schedule, solver, times, jnp.int32(steps), jnp.ones((1, 1, 1, 1)), keys)
    assert len(calls) == PROMISES[text].evaluations(steps)
    if text == "heun" and steps == 18:
        assert len(calls) == 35


@functools.cache
def all_grids(counts):
    """([(schedule, grid, steps)], their places, their times, their steps)."""
    cases = list(itertools.product(ROWS, GRIDS, counts))
    times = [plugs.build("grid", grid, GRIDS)(ROWS[name], jnp.int32(steps)) for name, grid, steps in cases]
    return cases, jnp.stack([place(name) for name, _, _ in cases]), jnp.stack(times), jnp.int32([c[2] for c in cases])


@pytest.mark.parametrize("text", typical(PROMISES))
def test_finite_from_pure_noise_to_the_image(text):
    """In float32, on every grid of every schedule, from t = 1, where alpha may be 0, to t = 0, where sigma is.

    100 steps end where the data is, at the modes -0.7 and 0.6. (An adaptive solver in 100 steps is one in 20.)
    """
    solver, data = plugs.build("solver", text, SOLVERS), tuple(jnp.float32(a) for a in TWO)
    cases, places, times, steps = all_grids((1, 2, 20) if text in ADAPTIVE else (1, 2, 20, 100))
    keys = rng.example_keys(jax.random.key(0), jnp.arange(3))

    def sample(solver, place, times, steps):
        schedule = Picked(place)
        x = schedule.sigma(jnp.float32(1.0)) * jnp.float32([-4.0, 0.0, 1.0]).reshape(3, 1, 1, 1)
        return solve(mixture(schedule, data), schedule, solver, times, steps, x, keys)

    one_by_one = jax.jit(lambda solver, *cases: jax.lax.map(lambda case: sample(solver, *case), cases))
    images = np.asarray(one_by_one(solver, places, times, steps)).reshape(len(cases), 3)
    assert not [case for case, image in zip(cases, images, strict=True) if not np.all(np.isfinite(image))]
    assert not [(c, image) for c, image in zip(cases, images, strict=True) if c[2] > 20 and np.abs(image).max() > 2.0]


@pytest.mark.parametrize("text", ODE)
def test_encoding_ends_in_pure_noise(text):
    """On `reverse`'s grid in float32, where rectified flow ends in alpha = 0: finite, and near the exact flow.

    Near, no more: the first step, from sigma / alpha = 1/1000 to 1/49, is a long one in log-SNR.
    """
    schedule, steps, x = ROWS["rectified_flow"], jnp.int32(50), np.array([-0.9, -0.5, 0.3, 0.8])
    times = reverse(schedule, GRIDS["uniform"]()(schedule, steps), steps)
    assert float(times[50]) == 1.0
    data = tuple(jnp.float32(a) for a in TWO)
    keys = rng.example_keys(jax.random.key(0), jnp.arange(4))
    sample = jax.jit(lambda *args: solve(mixture(schedule, data), schedule, *args))
    noise = sample(plugs.build("s", text, SOLVERS), times, steps, jnp.float32(x).reshape(4, 1, 1, 1), keys)
    with jax.enable_x64(True):
        truth = transported(x, "rectified_flow", float(times[0]), 1.0, TWO)
    np.testing.assert_allclose(np.asarray(noise).reshape(-1), truth, atol=0.15)


@pytest.mark.parametrize("text", ["rk45(rtol=0.001,atol=0.001)", "unipc(order=3)"])
def test_an_image_does_not_depend_on_the_batch(text, x64):
    """Nor do its steps, where they adapt themselves."""
    times = logsnr_grid("vp_linear", 3)
    x = curves("vp_linear", times[0])[1] * np.array([-1.0, 0.3, 0.5, 1.6])
    whole = run(text, "vp_linear", TWO, times, x)
    other = run(text, "vp_linear", TWO, times, np.array([x[0], 40.0, -30.0, x[3]]))
    np.testing.assert_allclose(other[[0, 3]], whole[[0, 3]], rtol=1e-12)


def test_rk45_shows_what_is_not_a_number():
    """Instead of looking for ever shorter steps."""
    schedule = ROWS["edm"]
    denoise = lambda x, t: Denoised(jnp.where(x > 0.0, jnp.nan, x), jnp.zeros_like(x))
    x, keys = jnp.float32([-1.0, 1.0]).reshape(2, 1, 1, 1), rng.example_keys(jax.random.key(0), jnp.arange(2))
    image = solve(denoise, schedule, SOLVERS["rk45"](), jnp.float32([1.0, 0.5]), jnp.int32(1), x, keys)
    np.testing.assert_array_equal(np.isnan(image).reshape(-1), [False, True])


@pytest.mark.parametrize("text", SOLVERS)
def test_new_steps_times_and_options_do_not_compile_again(text):
    """A solver's numeric options are leaves of a pytree, the number of steps is traced: one trace serves all."""
    schedule, traces, data = ROWS["cosine"], [], tuple(jnp.float32(a) for a in TWO)

    @jax.jit
    def sample(solver, times, steps, x, keys):
        traces.append(1)
        return solve(mixture(schedule, data), schedule, solver, times, steps, x, keys)

    numbers = {"ddpm": "ddpm(variance=0.0)", "rk45": "rk45(rtol=1e-5,atol=1e-5)"}
    solver = plugs.build("solver", numbers.get(text, text), SOLVERS)
    other = jax.tree.map(lambda leaf: leaf + 0.25, solver)
    x, results = jnp.full((2, 1, 1, 1), 0.7), []
    for steps, which, seed in ((3, solver, 0), (5, solver, 1), (5, other, 1), (8, solver, 2)):
        keys = rng.example_keys(jax.random.key(seed), jnp.arange(2))
        times = GRIDS["uniform"]()(schedule, jnp.int32(steps))
        results.append(np.asarray(sample(which, times, jnp.int32(steps), x, keys)))
    assert len(traces) == 1
    assert not np.array_equal(results[0], results[1])
    if jax.tree.leaves(solver):
        assert not np.allclose(results[1], results[2])


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("ddim(eta=-0.1)", "eta"),
        ("ddim(eta=1.5)", "eta"),
        ("lms(order=0)", "order"),
        ("lms(order=5)", "order"),
        ("unipc(order=1)", "order"),
        ("unipc(order=4)", "order"),
        ("rk45(rtol=0.0)", "rtol"),
        ("rk45(atol=-1.0)", "atol"),
    ],
)
def test_impossible_options(text, field):
    with pytest.raises(UserError, match=rf"sample.solver.*{field} must"):
        plugs.build("sample.solver", text, SOLVERS)


def test_no_two_solvers_are_one_structure_to_jax():
    """Else a jitted function that has run one of them may run its program for the other."""
    structures = [jax.tree.structure(plugs.build("solver", text, SOLVERS)) for text in (*SOLVERS, "unipc(order=3)")]
    assert all(a != b for i, a in enumerate(structures) for b in structures[:i])
