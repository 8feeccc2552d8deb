"""The stochastic solvers against their papers, by exact moments.

For Gaussian data a step is affine in x and in its noise z. So a run's law can be computed instead of sampled:
`marked` makes the noise of draw k 1 in image k + 2 and 0 in all others. Image 0 starts at 0, image 1 at 1, all
others at 0; what comes out are the coefficients of the whole run, and from them its mean and variance at every stop.

A new row of `SOLVERS` that promises noise joins by its promise; `PAPERS` and `WEAK_ORDERS` must then say what its paper
does.
"""

import contextlib
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from diffusion_jax import plugs, rng
from diffusion_jax.diffusion.schedule import SCHEDULES
from diffusion_jax.diffusion.solvers import SOLVERS
from diffusion_jax.diffusion.solvers.base import solve, trajectory
from diffusion_jax.errors import UserError
from diffusion_jax.types import Denoised
from tests.contracts.closed_form import GAUSSIAN, TWO, curves, logsnr_grid, mixture, run
from tests.contracts.papers_sde import (
    MEAN,
    STD,
    crowson,
    ho,
    ideal,
    karras,
    kingma,
    lu,
    ma,
    song,
    song_ddim,
)
from tests.contracts.test_solvers import SDE, typical

pytestmark = pytest.mark.usefixtures("quick_compilation")

DRAWS = 4  # more than any solver makes in a step
NAMES = ("vp_linear", "cosine", "edm", "rectified_flow")


@contextlib.contextmanager
def marked():
    """Keys are numbers that say which draw is made: the step's, or four times the step's plus the draw's within it."""

    def normal(keys, shape, dtype=jnp.float32):
        return (jnp.arange(len(keys)) == keys[0] + 2).astype(dtype).reshape(-1, *(1 for _ in shape))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rng, "fold", lambda keys, j: keys * DRAWS + jnp.asarray(j).astype(keys.dtype))
        patch.setattr(rng, "normal", normal)
        yield


def start(steps):
    """(x, keys) of the images of `marked`."""
    count = 2 + DRAWS * steps
    return jnp.zeros((count, 1, 1, 1), jnp.float64).at[1].set(1.0), jnp.zeros(count, jnp.int64)


def coefficients(text, name, times, data=GAUSSIAN):
    """f64[steps + 1, images]: what each stop is made of, from the solver."""
    schedule, solver = plugs.build("schedule", name, SCHEDULES), plugs.build("solver", text, SOLVERS)
    data = tuple(jnp.asarray(a, jnp.float64) for a in data)
    x, keys = start(len(times) - 1)
    with marked(), jax.disable_jit():
        stops = trajectory(
            mixture(schedule, data), schedule, solver, jnp.asarray(times, jnp.float64), len(times) - 1, x, keys
        )
    return np.asarray(stops).reshape(len(times), -1)


def moments(stops, mean, variance):
    """(mean, variance) of each stop, where the first has the given ones."""
    offset, slope, noise = stops[:, 0], stops[:, 1] - stops[:, 0], stops[:, 2:] - stops[:, :1]
    return offset + slope * mean, slope**2 * variance + (noise**2).sum(axis=-1)


# ------------------------------------------------------------------------------------------ every step


PAPERS = [
    *((f"ddim(eta={eta})", n, song_ddim(n, eta)) for n in ("vp_linear", "cosine") for eta in (0.5, 1.0)),
    *(("ddpm", n, ho(n, 0.0)) for n in ("vp_linear", "cosine")),
    *((f"ddpm(variance={v})", "vp_linear", ho("vp_linear", v)) for v in (0.3, 1.0)),
    *(("ddpm", n, kingma(n)) for n in NAMES),
    *((f"euler_ancestral(eta={eta})", n, crowson(n, eta)) for n in NAMES for eta in (0.6, 1.0, 1.2)),
    *(("sde_dpmpp_2m", n, lu(n)) for n in NAMES),
    *(("euler_maruyama", n, song(n)) for n in ("vp_linear", "cosine", "edm")),
    *((f"predictor_corrector(corrections={c})", n, song(n, 0.16, c)) for n in ("vp_linear", "edm") for c in (1, 2)),
    *((f"flow_sde(diffusion={d})", n, ma(n, d)) for n in ("edm", "rectified_flow") for d in (0.5, 1.0)),
    ("edm(churn=0.3,s_min=0.2,s_max=30.0,s_noise=1.01)", "edm", karras("edm", 0.3, 0.2, 30.0, 1.01)),
    ("edm", "edm", karras("edm", 0.15625, 0.05, 50.0, 1.003)),
]


@pytest.mark.parametrize(("text", "name", "paper"), PAPERS, ids=[f"{t}-{n}-{p.__qualname__[:4]}" for t, n, p in PAPERS])
def test_every_step_is_the_papers(text, name, paper, x64):
    """Six uneven steps, at every stop: the coefficients of x and of every z, and so the mean and the variance."""
    times = np.append(logsnr_grid(name, 5, high=40.0, low=0.05, zigzag=True), 0.0)
    got = coefficients(text, name, times)
    x, recall, expected = np.asarray(start(6)[0]).reshape(-1), {}, []
    for i, (t, s) in enumerate(itertools.pairwise(times)):
        first = i * DRAWS if text.startswith("predictor_corrector") else i
        x = paper(x, t, s, np.eye(len(x))[2 + first : 2 + first + DRAWS], recall)
        expected.append(x)
    np.testing.assert_allclose(got[1:], expected, rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------------------ the law of a run


@pytest.mark.parametrize("text", typical(SDE))
def test_samples_have_the_exact_law(text, x64):
    """With true keys: draws are standard normal, new in every step and image, and independent within a step.

    4,096 samples of 8 steps; the tolerances are 4 standard errors.
    """
    count, times = 4096, np.append(logsnr_grid("cosine", 7, high=40.0, low=0.05), 0.0)
    alpha, sigma = curves("cosine", times[0])
    total = np.sqrt(alpha**2 * STD**2 + sigma**2)
    x = alpha * MEAN + total * stats.norm.ppf((np.arange(count) + 0.5) / count)
    samples = run(text, "cosine", GAUSSIAN, times, x)
    mean, variance = (m[-1] for m in moments(coefficients(text, "cosine", times), alpha * MEAN, total**2))
    np.testing.assert_allclose(samples.mean(), mean, atol=4.0 * np.sqrt(variance / count))
    np.testing.assert_allclose(samples.var(), variance, rtol=4.0 * np.sqrt(2.0 / count))
    assert stats.kstest((samples - mean) / np.sqrt(variance), "norm").pvalue > 0.001


class LinearBetas:
    """The 1,000 betas of Ho et al. 2020, section 4: beta_1 = 1e-4 to beta_T = 0.02; t = k / 1000 is their step k."""

    bar = np.append(1.0, np.cumprod(1.0 - np.linspace(1e-4, 0.02, 1000)))

    def alpha(self, t):
        return jnp.sqrt(jnp.interp(1000.0 * t, jnp.arange(1001.0), jnp.asarray(self.bar)))

    def sigma(self, t):
        return jnp.sqrt(1.0 - self.alpha(t) ** 2)


BETAS = LinearBetas()


@functools.cache
def long_run(schedule, limit):
    """(solver, times, steps) -> (mean, variance) of a run in up to `limit` steps, compiled once a kind of solver."""
    data = tuple(jnp.asarray(a, jnp.float64) for a in GAUSSIAN)
    x, keys = start(limit)
    program = jax.jit(
        lambda solver, times, steps: solve(mixture(schedule, data), schedule, solver, times, steps, x, keys)
    )

    def run(solver, times, mean, variance):
        steps = len(times) - 1
        padded = jnp.zeros(limit + 1).at[: steps + 1].set(jnp.asarray(times))
        with marked():
            stop = np.asarray(program(solver, padded, jnp.int32(steps))).reshape(1, -1)
        return tuple(m[0] for m in moments(stop, mean, variance))

    return run


@pytest.mark.parametrize(
    ("variance", "published"),
    [
        (0.0, {10: 0.1042, 50: 0.1964, 250: 0.2360, 1000: 0.2461}),
        (1.0, {10: 0.3585, 50: 0.2679, 250: 0.2533, 1000: 0.2508}),
    ],
)
def test_variance_of_ddpm_on_its_own_betas(variance, published, x64):
    """The figures of an independent implementation, for data of variance 1/4, x_T of variance 1 and N of 1,000 steps.

    The N are numpy's linspace from the last to the first, rounded; the last one adds no noise.
    """
    for steps, expected in published.items():
        times = np.append(np.round(np.linspace(999, 0, steps)) + 1.0, 0.0) / 1000.0
        got = long_run(BETAS, 1000)(SOLVERS["ddpm"](variance=variance), times, 0.0, 1.0)[1]
        assert abs(got - expected) < 6e-5


def variance_error(text, name, steps):
    """|variance - the data's| after `steps` steps of equal log-SNR, and one to t = 0."""
    schedule, solver = plugs.build("schedule", name, SCHEDULES), plugs.build("solver", text, SOLVERS)
    times = np.append(logsnr_grid(name, steps - 1, high=60.0, low=0.002), 0.0)
    alpha, sigma = curves(name, times[0])
    return abs(long_run(schedule, 512)(solver, times, alpha * MEAN, alpha**2 * STD**2 + sigma**2)[1] - STD**2)


WEAK_ORDERS = {
    "ddim(eta=1.0)": 1,
    "ddpm": 1,
    "ddpm(variance=1.0)": 1,
    "euler_ancestral": 1,
    "euler_maruyama": 1,
    "flow_sde": 1,
    "sde_dpmpp_2m": 2,
    # S_churn / N: a churn that does not fall with N adds noise without end
    "edm(churn={:.17f},s_min=0.0,s_max=1e9,s_noise=1.0)": 2,
}

UNORDERED = {
    "predictor_corrector": "its corrections do not shrink with N: the slope falls from 1.5 (64 steps) to 1.1 (512)",
}
"""Solver -> why it has no weak order; `test_the_corrector_reduces_the_error_of_its_predictor` looks at its error."""


def test_every_solver_with_noise_is_held_to_its_paper():
    """In its steps and in its weak order, or it is said why not."""
    rows = lambda texts: {text.split("(")[0] for text in texts}
    assert rows(text for text, _, _ in PAPERS) == rows(SDE)
    assert rows(WEAK_ORDERS) | set(UNORDERED) == rows(SDE)
    assert not rows(WEAK_ORDERS) & set(UNORDERED)


@pytest.mark.parametrize("name", ["vp_linear", "edm", "rectified_flow"])
@pytest.mark.parametrize("text", WEAK_ORDERS)
def test_variance_converges_to_that_of_the_data(text, name, x64):
    """Euler-Maruyama and what is like it have weak order 1 (Kloeden & Platen 1992, chapter 14).

    2M takes x0, and EDM the flow between its additions of exact noise, to second order.
    """
    counts = (64, 128, 256, 512)
    errors = [variance_error(text.format(8.0 / steps), name, steps) for steps in counts]
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert abs(slope - WEAK_ORDERS[text]) < 0.15, (slope, errors)
    assert errors[-1] < 0.006


@pytest.mark.parametrize("name", ["vp_linear", "edm", "rectified_flow"])
def test_the_corrector_reduces_the_error_of_its_predictor(name, x64):
    """Song et al. 2021, section 4.2, at the same number of steps; three corrections reduce it further."""
    for steps in (8, 32, 128, 512):
        corrected = variance_error("predictor_corrector", name, steps)
        assert corrected < 0.95 * variance_error("euler_maruyama", name, steps)
        assert variance_error("predictor_corrector(corrections=3)", name, steps) < corrected


# ------------------------------------------------------------------------------------------ closed forms


POINT_LAW = ("ddpm", "euler_ancestral", "euler_ancestral(eta=0.4)", "sde_dpmpp_2m", "edm(churn=0.4,s_noise=1.0)")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text", POINT_LAW)
def test_on_a_single_point_every_stop_has_the_exact_law(text, name, x64):
    """N(alpha m, sigma^2), from t = 1 in three uneven steps: there x0 and eps stand still and the steps are exact."""
    times = np.array([1.0, 0.55, 0.02, 0.0])
    alpha, sigma = curves(name, times)
    mean, variance = moments(
        coefficients(text, name, times, ((0.37, 0.37), (0.0, 0.0), (0.5, 0.5))), alpha[0] * 0.37, sigma[0] ** 2
    )
    np.testing.assert_allclose(mean, alpha * 0.37, rtol=1e-9)
    np.testing.assert_allclose(variance, sigma**2, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("name", ["vp_linear", "cosine"])
def test_the_variance_beta_is_exact_for_white_data(name, x64):
    """Ho et al. 2020, section 3.2: beta is right for x0 ~ N(0, I), in steps of any length."""
    white = ((0.0, 0.0), (1.0, 1.0), (0.5, 0.5))
    times = np.array([1.0, 0.7, 0.1, 0.05])
    variance = moments(coefficients("ddpm(variance=1.0)", name, times, white), 0.0, 1.0)[1]
    np.testing.assert_allclose(variance, 1.0, rtol=1e-9)
    assert moments(coefficients("ddpm(variance=0.0)", name, times, white), 0.0, 1.0)[1][2] < 0.9


@pytest.mark.parametrize("text", SDE)
def test_from_pure_noise(text, x64):
    """Where alpha is 0 a step is the limit of those from where it is nearly 0; ancestral ones forget x entirely.

    The second step of 2M is left out: the x0 of noise 1e-10 away still counts in it, with weight h / h_last = h / 23.
    """
    at, near = (coefficients(text, "rectified_flow", [t, 0.6, 0.2, 0.0]) for t in (1.0, 1.0 - 1e-10))
    stops = 2 if text == "sde_dpmpp_2m" else 4
    np.testing.assert_allclose(at[:stops], near[:stops], atol=1e-8)
    assert np.all(np.isfinite(at))
    if text in ("ddpm", "ddim(eta=1.0)", "euler_ancestral", "sde_dpmpp_2m"):
        np.testing.assert_allclose(at[1, :4], [0.4 * MEAN, 0.4 * MEAN, 0.4 * MEAN + 0.6, 0.4 * MEAN], rtol=1e-12)


@pytest.mark.parametrize(("name", "steps"), [("vp_linear", (0.3, 0.15)), ("edm", (0.1, 0.05))])
def test_euler_maruyama_is_the_literal_step_up_to_second_order(name, steps, x64):
    """Song et al. 2021, eq. 6, with f = -beta/2 and g^2 = beta (eq. 11), or f = 0 and g^2 = d(sigma^2)/dt (eq. 9)."""
    t, gaps = 0.6, []
    for step in (steps[0] / 10, steps[1] / 10):
        beta = 0.1 + 19.9 * t
        f, g2 = (-beta / 2.0, beta) if name == "vp_linear" else (0.0, 2.0 * 80.0**2 * t)
        x = np.eye(6)[1]
        score = -ideal(name)(x, t)[1] / curves(name, t)[1]
        literal = x - step * (f * x - g2 * score) + np.sqrt(g2 * step) * np.eye(6)[2]
        gap = coefficients("euler_maruyama", name, [t, t - step])[1] - literal
        gaps.append([gap[1] - gap[0], (gap[2] - gap[0]) / np.sqrt(step)])
    np.testing.assert_allclose(gaps[0][0] / gaps[1][0], 4.0, rtol=0.1)  # drift: O(step^2)
    np.testing.assert_allclose(gaps[0][1] / gaps[1][1], 2.0, rtol=0.1)  # noise: O(step) of sqrt(step)


@pytest.mark.parametrize("name", NAMES)
def test_churn_leads_from_the_law_at_t_to_the_law_further_up(name, x64):
    """Heun's method starts from N(alpha m, alpha^2 s^2 + sigma^2) at that time, if x had the law of its own."""
    schedule, asked = plugs.build("schedule", name, SCHEDULES), []
    x, keys = start(1)

    def denoise(x, t):
        asked.append((np.asarray(x).reshape(1, -1), float(t)))
        return Denoised(x, x)

    for ratio, inside in ((60.0, False), (3.0, True), (0.2, True), (0.04, False)):
        t = schedule.time(jnp.float64(-2.0 * np.log(ratio)))
        solver = plugs.build("solver", "edm(churn=0.25,s_min=0.05,s_max=50.0,s_noise=1.0)", SOLVERS)
        asked.clear()
        with marked(), jax.disable_jit():
            solver.step(denoise, schedule, x, t, 0.5 * t, (), keys)
        alpha, sigma = curves(name, t)
        higher_alpha, higher_sigma = curves(name, asked[0][1])
        np.testing.assert_allclose(higher_sigma / higher_alpha, ratio * (1.25 if inside else 1.0), rtol=1e-9)
        mean, variance = moments(asked[0][0], alpha * MEAN, alpha**2 * STD**2 + sigma**2)
        np.testing.assert_allclose(mean, higher_alpha * MEAN, rtol=1e-9)
        np.testing.assert_allclose(variance, higher_alpha**2 * STD**2 + higher_sigma**2, rtol=1e-9)


def test_churn_does_not_lead_beyond_the_noise(x64):
    """Were noise added at t = 0.99 to 1.4 times sigma / alpha, no time of the schedule would have that much."""
    schedule, asked = plugs.build("schedule", "cosine", SCHEDULES), []
    denoise = lambda x, t: asked.append(float(t)) or Denoised(x, x)
    solver = SOLVERS["edm"](churn=0.4, s_max=float("inf"))
    keys = rng.example_keys(jax.random.key(0), jnp.arange(1))
    with jax.disable_jit():
        for t in (1.0, 1.0 - 1e-5):
            solver.step(denoise, schedule, jnp.ones((1, 1, 1, 1)), jnp.float64(t), jnp.float64(0.5), (), keys)
    assert asked == [1.0, 0.5, 1.0, 0.5]


# ------------------------------------------------------------------------------------------ one solver as another


TIMES = [0.97, 0.6, 0.45, 0.1, 0.0]
STARTS = np.linspace(-1.5, 1.5, 7)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("ddpm", "ddim(eta=1.0)"),  # Song, Meng & Ermon 2021, section 4.1
        ("euler_ancestral", "ddim(eta=1.0)"),
        ("euler_ancestral(eta=0.3)", "ddim(eta=0.3)"),
        ("euler_ancestral(eta=0.0)", "euler"),
        ("edm(churn=0.0)", "heun"),  # Karras et al. 2022, algorithm 1
        ("flow_sde(diffusion=0.0)", "euler"),
    ],
)
def test_a_solver_that_is_another(text, other, name, x64):
    """With the same keys, on a mixture."""
    got, expected = (run(solver, name, TWO, TIMES, STARTS) for solver in (text, other))
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["cosine", "edm"])
def test_edm_without_churn_is_heun_to_the_bit(name):
    schedule = plugs.build("schedule", name, SCHEDULES)
    denoise = mixture(schedule, tuple(jnp.float32(a) for a in TWO))
    keys = rng.example_keys(jax.random.key(0), jnp.arange(7))
    x = jnp.float32(STARTS).reshape(7, 1, 1, 1)
    with jax.disable_jit():
        for t, s in ((1.0, 0.7), (0.3, 0.1), (0.1, 0.0)):
            solvers = SOLVERS["edm"](churn=0.0), SOLVERS["heun"]()
            a, b = (v.step(denoise, schedule, x, jnp.float32(t), jnp.float32(s), (), keys)[0] for v in solvers)
            np.testing.assert_array_equal(a, b)


def test_the_first_step_of_sde_dpmpp_2m_is_ddpms(x64):
    """Without a last x0 there is no correction (Lu et al. 2022b: SDE-DPM-Solver++1); in the second step there is."""
    first, second = ([run(s, "cosine", TWO, TIMES[:n], STARTS) for s in ("sde_dpmpp_2m", "ddpm")] for n in (2, 3))
    np.testing.assert_allclose(*first, rtol=1e-9)
    assert np.abs(second[0] - second[1]).max() > 1e-3


# ------------------------------------------------------------------------------------------ learned variance


def test_a_learned_spread_is_taken_pixel_by_pixel_unless_a_variance_is_given(x64):
    """Nichol & Dhariwal 2021, eq. 15: 0 is the posterior's variance, 1 is beta, between lies a geometric mean."""
    schedule = plugs.build("schedule", "vp_linear", SCHEDULES)
    t, s, spread = jnp.float64(0.5), jnp.float64(0.3), np.array([0.0, 1.0, 0.25])
    keys = rng.example_keys(jax.random.key(0), jnp.arange(4096))

    def noise(solver, spread):
        zero = jnp.zeros((4096, 3, 1, 1))
        spread = None if spread is None else jnp.broadcast_to(jnp.asarray(spread).reshape(3, 1, 1), zero.shape)
        denoise = lambda x, t: Denoised(x, x, spread)
        return np.asarray(solver.step(denoise, schedule, zero, t, s, (), keys)[0]).reshape(4096, 3)

    bar_t, bar_s = (curves("vp_linear", u)[0] ** 2 for u in (t, s))
    beta = 1.0 - bar_t / bar_s
    posterior = (1.0 - bar_s) / (1.0 - bar_t) * beta
    learned = noise(SOLVERS["ddpm"](), spread)
    expected = np.sqrt(beta**spread * posterior ** (1.0 - spread))
    np.testing.assert_allclose(learned.std(axis=0), expected, rtol=4.0 / np.sqrt(2 * 4096))
    for pixel, value in enumerate(spread):
        fixed = noise(SOLVERS["ddpm"](variance=float(value)), None)
        np.testing.assert_allclose(learned[:, pixel], fixed[:, pixel], rtol=1e-12)
    given = SOLVERS["ddpm"](variance=0.7)
    np.testing.assert_allclose(noise(given, spread), noise(given, None), rtol=1e-14)
    np.testing.assert_allclose(noise(SOLVERS["ddpm"](), None), noise(SOLVERS["ddpm"](variance=0.0), None), rtol=1e-14)


# ------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("ddpm(variance=1.5)", "variance"),
        ("euler_ancestral(eta=-0.1)", "eta"),
        ("edm(churn=0.5)", "churn"),
        ("edm(s_min=2.0,s_max=1.0)", "s_min"),
        ("edm(s_noise=0.0)", "s_noise"),
        ("flow_sde(diffusion=-1.0)", "diffusion"),
        ("predictor_corrector(snr=0.0)", "snr"),
        ("predictor_corrector(corrections=0)", "corrections"),
    ],
)
def test_impossible_options(text, field):
    with pytest.raises(UserError, match=rf"sample.solver.*{text.split('(')[0]}.*{field}"):
        plugs.build("sample.solver", text, SOLVERS)
