"""What every solver promises, on data whose ideal denoiser is known in closed form.

A new row of `SOLVERS` joins by being registered; `PROMISES` must then say what it promises.
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from diffusion_jax import plugs, rng
from diffusion_jax.diffusion import guidance
from diffusion_jax.diffusion.grids import GRIDS
from diffusion_jax.diffusion.schedule import SCHEDULES
from diffusion_jax.diffusion.solvers import SOLVERS
from diffusion_jax.diffusion.solvers.base import solve
from diffusion_jax.errors import UserError
from diffusion_jax.types import Denoised
from tests.contracts.closed_form import GAUSSIAN, POINT, TWO, curves, logsnr_grid, mixture, run, transported


@dataclass(frozen=True, kw_only=True)
class Promise:
    """What is known of a solver from its paper.

    Attributes:
      order: of convergence on the probability-flow ODE; None for a stochastic solver.
      evaluations: number of steps -> calls of the denoiser down to t = 0.
      reference: the paper's step in NumPy, (schedule's name, drift, eps, x, t, s) -> x at s; None where it has no
        statement that differs from ours.
      stated_for: the schedules that the paper's step is stated for.
    """

    order: int | None
    evaluations: Callable[[int], int]
    reference: Callable | None = None
    stated_for: tuple[str, ...] = tuple(SCHEDULES)


def ddim_step(name, drift, eps, x, t, s):
    """Song, Meng & Ermon 2021, eq. 12 without noise, for x / alpha as in their eq. 13."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = curves(name, t), curves(name, s)
    return alpha_s * (x / alpha_t + (sigma_s / alpha_s - sigma_t / alpha_t) * eps(x, t))


def euler_step(name, drift, eps, x, t, s):
    return x + (s - t) * drift(x, t)


def heun_step(name, drift, eps, x, t, s):
    """Karras et al. 2022, algorithm 1, lines 4 to 8."""
    d = drift(x, t)
    end = x + (s - t) * d
    return end if s == 0.0 else x + (s - t) * (d / 2 + drift(end, s) / 2)


STRAIGHT = ("edm", "rectified_flow")
"""Whose alpha and sigma are linear in t."""

PROMISES = {
    # Song, Meng & Ermon 2021, eq. 12; order 1: Lu et al. 2022 (DPM-Solver), section 4.1: DDIM is DPM-Solver-1
    "ddim": Promise(order=1, evaluations=lambda n: n, reference=ddim_step),
    "ddim(eta=0.5)": Promise(order=None, evaluations=lambda n: n),
    "ddim(eta=1.0)": Promise(order=None, evaluations=lambda n: n),
    "euler": Promise(order=1, evaluations=lambda n: n, reference=euler_step, stated_for=STRAIGHT),
    # Karras et al. 2022, algorithm 1: order 2, 2 n - 1 evaluations: "NFE = 35" for their 18 steps (Table 2)
    "heun": Promise(order=2, evaluations=lambda n: 2 * n - 1, reference=heun_step, stated_for=STRAIGHT),
}

ODE = [text for text, promise in PROMISES.items() if promise.order]
SDE = [text for text, promise in PROMISES.items() if not promise.order]
VARIANCE_PRESERVING = ("vp_linear", "cosine")


def test_every_solver_makes_its_promises():
    assert {plugs.parse("", text)[0] for text in PROMISES} == set(SOLVERS)


# ------------------------------------------------------------------------------------------ order


@pytest.mark.parametrize("zigzag", [False, True], ids=["regular", "zigzag"])
@pytest.mark.parametrize("data", [GAUSSIAN, TWO], ids=["gaussian", "mixture"])
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("text", ODE)
def test_order_of_convergence(text, name, data, zigzag, x64):
    """The slope of log(error) over log(steps), to the exact flow; measured elsewhere as 0.99 and 1.96 to 2.03."""
    counts = np.array([128, 256, 512, 1000])
    ends = logsnr_grid(name, 1)
    alpha, sigma = curves(name, ends[0])
    x = alpha * 0.1 + np.hypot(sigma, 0.5 * alpha) * np.array([-1.3, -0.4, 0.5, 1.6])
    truth = transported(x, name, ends[0], ends[1], data)
    errors = [np.abs(run(text, name, data, logsnr_grid(name, n, zigzag=zigzag), x) - truth).mean() for n in counts]
    order = PROMISES[text].order
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert abs(slope - order) < 0.12, (slope, errors)
    assert errors[-1] < {1: 2e-2, 2: 2e-4}.get(order, 1e-5)


# ------------------------------------------------------------------------------------------ exact maps


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("text", ODE)
def test_map_of_the_gaussian_ode(text, name, x64):
    """x_t - alpha_t mu grows by the ratio of the standard deviations (alpha^2 s^2 + sigma^2)^1/2; linear in x."""
    times = logsnr_grid(name, 1000, low=0.002)
    (a, b), (c, d) = curves(name, times[0]), curves(name, times[-1])
    x = a * 0.4 + b * np.array([-2.0, -1.0, 0.0, 2.0])
    expected = c * 0.4 + (x - a * 0.4) * np.hypot(c * 0.5, d) / np.hypot(a * 0.5, b)
    got = run(text, name, GAUSSIAN, times, x)
    np.testing.assert_allclose(got, expected, atol={1: 0.02}.get(PROMISES[text].order, 2e-4))
    np.testing.assert_allclose(got[3] - got[2], 2.0 * (got[2] - got[1]), rtol=1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("text", PROMISES)
def test_a_single_point_is_reached_in_three_steps(text, name, x64):
    """All flow lines end in the point, and on them x0 and eps stand still: the steps may be as uneven as they like."""
    alpha, sigma = curves(name, 1.0)
    x = alpha * 0.37 + sigma * np.array([-1.5, -0.2, 0.6, 2.0])
    np.testing.assert_allclose(run(text, name, POINT, [1.0, 0.55, 0.2, 0.0], x), 0.37, atol=1e-9)
    if PROMISES[text].order:  # and every stop between lies on the line
        (a, b), (c, d) = curves(name, 1.0), curves(name, 0.2)
        expected = c * 0.37 + d * (x - a * 0.37) / b
        np.testing.assert_allclose(run(text, name, POINT, [1.0, 0.55, 0.2], x), expected, rtol=1e-9)


@pytest.mark.parametrize(
    ("text", "name"), [(t, n) for t in ODE if PROMISES[t].reference for n in PROMISES[t].stated_for]
)
def test_three_steps_as_the_paper_writes_them(text, name, x64):
    """In NumPy, and from the score: dx/dt = f x - g^2 / 2 score, f = alpha'/alpha, g^2 = 2 sigma (sigma' - f sigma)."""

    def eps(x, t):
        alpha, sigma = curves(name, t)
        return sigma * (x - alpha * 0.4) / (alpha**2 * 0.25 + sigma**2)

    def drift(x, t):
        alpha, sigma = curves(name, t)
        h = 1e-6
        d_alpha, d_sigma = (
            np.subtract(*pair) / (2 * h) for pair in zip(curves(name, t + h), curves(name, t - h), strict=True)
        )
        f = d_alpha / alpha
        score = -eps(x, t) / sigma
        return f * x - sigma * (d_sigma - f * sigma) * score

    times = [0.9, 0.55, 0.2, 0.0]
    x = curves(name, 0.9)[1] * np.array([-1.5, 0.1, 0.7])
    expected = x
    for t, s in itertools.pairwise(times):
        expected = PROMISES[text].reference(name, drift, eps, expected, t, s)
    np.testing.assert_allclose(run(text, name, GAUSSIAN, times, x), expected, rtol=1e-7, atol=1e-7)


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
    schedule = plugs.build("schedule", name, SCHEDULES)
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
@pytest.mark.parametrize("name", SCHEDULES)
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


@pytest.mark.parametrize("text", PROMISES)
def test_only_stochastic_solvers_look_at_keys(text, x64):
    x = np.linspace(-1.0, 1.0, 5)
    first, second = (run(text, "cosine", TWO, logsnr_grid("cosine", 6), x, key) for key in (0, 1))
    assert np.array_equal(first, second) == (text in ODE)


@pytest.mark.parametrize("text", SDE)
def test_an_image_depends_on_its_own_key_and_start(text, x64):
    times = logsnr_grid("vp_linear", 6)
    whole = run(text, "vp_linear", TWO, times, np.array([0.3, 0.3, -0.5]))
    other = run(text, "vp_linear", TWO, times, np.array([0.3, 5.0, -0.5]))
    assert whole[0] != whole[1]  # same start, different keys
    np.testing.assert_allclose(other[[0, 2]], whole[[0, 2]], rtol=1e-12)


# ------------------------------------------------------------------------------------------ the machine


@pytest.mark.parametrize("text", PROMISES)
@pytest.mark.parametrize("steps", [1, 2, 18])
def test_number_of_evaluations(text, steps):
    """Counted as they happen: without jit the branches that are not taken are not run. EDM's Heun, 18 steps: 35."""
    schedule, calls = plugs.build("schedule", "edm", SCHEDULES), []

    def denoise(x, t):
        assert float(t) > 0.0
        calls.append(float(t))
        return Denoised(0.5 * x, 0.1 * x)

    times = GRIDS["karras"]()(schedule, jnp.int32(steps))
    keys = rng.example_keys(jax.random.key(0), jnp.arange(1))
    with jax.disable_jit():
        solve(
            denoise,
            schedule,
            plugs.build("solver", text, SOLVERS),
            times,
            jnp.int32(steps),
            jnp.ones((1, 1, 1, 1)),
            keys,
        )
    assert len(calls) == PROMISES[text].evaluations(steps)
    if text == "heun" and steps == 18:
        assert len(calls) == 35


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("text", PROMISES)
def test_finite_from_pure_noise_to_the_image(text, name):
    """In float32, on every grid, from t = 1, where alpha may be 0, to t = 0, where sigma is; clipped and not."""
    schedule, solver = plugs.build("schedule", name, SCHEDULES), plugs.build("solver", text, SOLVERS)
    data = tuple(jnp.float32(a) for a in TWO)
    keys = rng.example_keys(jax.random.key(0), jnp.arange(3))

    @jax.jit
    def sample(times, steps, x, bound):
        return solve(guidance.clip(mixture(schedule, data), schedule, bound), schedule, solver, times, steps, x, keys)

    x = schedule.sigma(jnp.float32(1.0)) * jnp.float32([-4.0, 0.0, 1.0]).reshape(3, 1, 1, 1)
    for grid in GRIDS:
        for steps in (1, 2, 20, 1000):
            times = plugs.build("grid", grid, GRIDS)(schedule, jnp.int32(steps))
            for bound in (1.0, jnp.inf):
                image = np.asarray(sample(times, jnp.int32(steps), x, jnp.float32(bound)))
                assert np.all(np.isfinite(image)), (grid, steps, bound)
            if steps == 1000:
                assert np.abs(image).max() < 2.0, (grid, image)  # the data's modes: -0.7 and 0.6


@pytest.mark.parametrize("text", SOLVERS)
def test_new_steps_times_and_options_do_not_compile_again(text):
    """A solver's numeric options are leaves of a pytree, the number of steps is traced: one trace serves all."""
    schedule, traces = plugs.build("schedule", "cosine", SCHEDULES), []

    @jax.jit
    def sample(solver, times, steps, x, keys):
        traces.append(1)
        return solve(mixture(schedule, tuple(jnp.float32(a) for a in TWO)), schedule, solver, times, steps, x, keys)

    solver = plugs.build("solver", text, SOLVERS)
    other = jax.tree.map(lambda leaf: leaf + 0.25, solver)
    x, results = jnp.full((2, 1, 1, 1), 0.7), []
    for steps, which, seed in ((3, solver, 0), (5, solver, 1), (5, other, 1), (8, solver, 2)):
        keys = rng.example_keys(jax.random.key(seed), jnp.arange(2))
        results.append(
            np.asarray(sample(which, GRIDS["uniform"]()(schedule, jnp.int32(steps)), jnp.int32(steps), x, keys))
        )
    assert len(traces) == 1
    assert not np.allclose(results[0], results[1])
    if jax.tree.leaves(solver):
        assert not np.allclose(results[1], results[2])


@pytest.mark.parametrize("eta", [-0.1, 1.5])
def test_impossible_eta(eta):
    with pytest.raises(UserError, match=r"sample.solver.*ddim.*eta"):
        plugs.build("sample.solver", f"ddim(eta={eta})", SOLVERS)


def test_no_two_solvers_are_one_structure_to_jax():
    """Else a jitted function that has run one of them may run its program for the other."""
    structures = [jax.tree.structure(solver()) for solver in SOLVERS.values()]
    assert all(a != b for i, a in enumerate(structures) for b in structures[:i])
