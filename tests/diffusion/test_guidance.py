"""Guidance: identities to the bit, the papers' statements in NumPy, and closed forms for Gaussians."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import plugs
from diffusion_jax.diffusion.guidance import (
    GUIDANCE_RULES,
    Rule,
    by_classifier,
    carried,
    guide,
    strong_and_weak,
    with_and_without_label,
)
from diffusion_jax.diffusion.schedule import SCHEDULES
from diffusion_jax.diffusion.solvers import SOLVERS
from diffusion_jax.diffusion.solvers.base import solve
from diffusion_jax.errors import UserError
from diffusion_jax.types import Denoised
from tests.contracts.closed_form import mixture

pytestmark = pytest.mark.usefixtures("quick_compilation")

NULL = 9
NAMES = ("vp_linear", "cosine", "edm", "rectified_flow")
RULES = ("interval(low=0.3,high=3.0)", "rescaled(phi=0.6)", "apg(eta=0.2,norm=1.5,momentum=-0.5)", "cfg_pp")


def of(schedule, mean, std):
    """The ideal denoiser of N(mean, std^2) a pixel; mean and std may be one an example, and t too."""

    def denoise(x, t):
        alpha, sigma = (c.reshape(-1, 1, 1, 1).astype(x.dtype) for c in (schedule.alpha(t), schedule.sigma(t)))
        off = (x - alpha * mean) / (alpha**2 * std**2 + sigma**2)
        return Denoised(mean + alpha * std**2 * off, sigma * off)

    return denoise


def two_gaussians(schedule, m=0.4, s=0.3, S=0.8):  # noqa: N803
    """Under its label N(m, s^2), without one N(0, S^2)."""

    def denoise(x, t, label):
        null = (label == NULL).reshape(-1, 1, 1, 1)
        return of(schedule, jnp.where(null, 0.0, m).astype(x.dtype), jnp.where(null, S, s).astype(x.dtype))(x, t)

    return denoise


def rules_of(*texts):
    return tuple(plugs.build("sample.rules", text, GUIDANCE_RULES) for text in texts)


def guided(schedule, label, weight, rules=()):
    return guide(with_and_without_label(two_gaussians(schedule), label, NULL), schedule, weight, rules)


@functools.cache
def compiled(schedule, *texts):
    """(x, t, label, weight) -> the guided (x0, eps)."""
    return jax.jit(lambda x, t, label, weight: guided(schedule, label, weight, rules_of(*texts))(x, t)[:2])


@pytest.fixture(params=NAMES)
def schedule(request):
    return plugs.build("schedule", request.param, SCHEDULES)


def test_every_rule_is_tested():
    assert {plugs.parse("", text)[0] for text in RULES} == set(GUIDANCE_RULES)


# ------------------------------------------------------------------------------------------ classifier-free


def exact(x, t, label):
    """A model whose only roundings are its sums', so that no compiler may round it differently."""
    offset = label.astype(x.dtype).reshape(-1, 1, 1, 1)
    return Denoised(0.5 * x + offset, 2.0 * x - offset)


def guided_exact(x, label, weight, rules=(), ratio=1.0):
    """`exact` guided at the time at which rectified flow's sigma / alpha is `ratio`."""
    schedule = SCHEDULES["rectified_flow"]()
    pair = with_and_without_label(exact, label, NULL)
    return guide(pair, schedule, jnp.float32(weight), rules)(x, jnp.float32(ratio / (1.0 + ratio)))


def three(seed=0):
    return jax.random.normal(jax.random.key(seed), (3, 8, 8, 1)), jnp.int32([0, 3, 8])


def test_weight_one_is_the_conditional_model_to_the_bit():
    """Where uncond + 1 (cond - uncond), rounded, is not."""
    x, label = three()
    conditional, unconditional = exact(x, None, label), exact(x, None, jnp.full_like(label, NULL))
    np.testing.assert_array_equal(guided_exact(x, label, 1.0)[:2], conditional[:2])
    assert np.any(np.asarray(unconditional[0] + (conditional[0] - unconditional[0])) != conditional[0])


def test_weight_zero_is_the_unconditional_model_to_the_bit():
    x, label = three()
    unconditional = exact(x, None, jnp.full_like(label, NULL))
    np.testing.assert_array_equal(guided_exact(x, label, 0.0)[:2], unconditional[:2])


def sizes_of_batches(weight, rules=(), ratio=1.0):
    """How many images the model is asked for: under disable_jit a branch runs only where it is taken."""
    sizes = []

    def denoise(x, t, label):
        sizes.append(x.shape[0])
        return Denoised(x, x)

    with jax.disable_jit():
        pair = with_and_without_label(denoise, jnp.int32([1, 2, 3]), NULL)
        run = guide(pair, SCHEDULES["rectified_flow"](), jnp.float32(weight), rules)
        run(jnp.ones((3, 2, 2, 1)), jnp.float32(ratio / (1.0 + ratio)))
    return sizes


def test_weight_one_costs_one_evaluation_of_the_batch():
    assert sizes_of_batches(1.0) == [3]
    assert sizes_of_batches(1.5) == [6]


def test_linear_in_the_weight(schedule, x64):
    x, label, t = jax.random.normal(jax.random.key(1), (5, 2, 2, 1)), jnp.int32([0, 1, 2, 3, 4]), jnp.float64(0.6)
    at = lambda w: np.asarray(compiled(schedule)(x, t, label, jnp.float64(w)))
    assert not np.allclose(at(0.0), at(1.0))
    for weight in (-0.5, 0.3, 2.0, 7.5):
        np.testing.assert_allclose(at(weight), at(0.0) + weight * (at(1.0) - at(0.0)), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rules", [(), *((text,) for text in RULES), RULES], ids=str)
def test_examples_do_not_see_each_other(rules, x64):
    """The doubled batch is undone in order: with one label and one time an example, all others may change."""
    schedule = SCHEDULES["cosine"]()
    x, weight = jax.random.normal(jax.random.key(1), (5, 2, 2, 1)), jnp.float64(3.0)
    label, t = jnp.int32([4, NULL, 0, NULL, 2]), jnp.asarray([0.6, 0.6, 0.02, 0.5, 0.5])
    run = compiled(schedule, *rules)
    whole = np.asarray(run(x, t, label, weight))
    for i in range(5):
        keep = jnp.arange(5) == i
        others = run(
            jnp.where(keep.reshape(5, 1, 1, 1), x, 9.0),
            jnp.where(keep, t, 0.4),
            jnp.where(keep, label, NULL - label),
            weight,
        )
        np.testing.assert_allclose(np.asarray(others)[:, i], whole[:, i], rtol=1e-12)
    if not rules:
        unlabelled = of(schedule, 0.0, 0.8)(x, t)[:2]
        np.testing.assert_allclose(whole[:, 1], np.asarray(unlabelled)[:, 1], rtol=1e-10)
        assert not np.allclose(whole[:, 0], np.asarray(unlabelled)[:, 0])


@pytest.mark.parametrize("rules", [(), *((text,) for text in RULES)], ids=str)
def test_weight_and_options_are_traced(rules):
    schedule, traces = SCHEDULES["cosine"](), []

    @jax.jit
    def run(rules, weight, x):
        traces.append(1)
        return guided(schedule, jnp.int32([1]), weight, rules)(x, jnp.float32(0.6)).x0

    rules = rules_of(*rules)
    others = jax.tree.map(lambda leaf: 0.1 + 0.5 * leaf, rules)
    x = jnp.float32([0.5, -1.0, 1.5, 0.1]).reshape(1, 2, 2, 1)
    results = [run(r, jnp.float32(w), x) for r, w in ((rules, 1.0), (rules, 4.0), (others, 4.0))]
    assert len(traces) == 1
    assert not np.allclose(results[0], results[1])
    if jax.tree.leaves(rules):
        changed = not np.allclose(results[1], results[2])
        assert changed == (not isinstance(rules[0], GUIDANCE_RULES["interval"]))  # both cover this time


def test_learned_variance_is_the_conditional_models():
    """A variance is not extrapolated: it would leave [0, 1]."""

    def denoise(x, t, label):
        return Denoised(x, x, spread=jnp.where((label == NULL).reshape(-1, 1, 1, 1), 0.1, 0.9) * jnp.ones_like(x))

    pair = with_and_without_label(denoise, jnp.int32([1, 2]), NULL)
    for weight in (0.0, 1.0, 5.0):
        run = guide(pair, SCHEDULES["cosine"](), jnp.float32(weight), rules_of(*RULES))
        np.testing.assert_array_equal(run(jnp.ones((2, 2, 2, 1)), jnp.float32(0.5)).spread, np.float32(0.9))


# ------------------------------------------------------------------------------------------ closed forms of the flow


def gain_and_mean(schedule, denoise, count=600):
    """The guided flow is affine, so two starting points give its gain, and where it takes x = 0, exactly."""
    ratio = np.linspace(60.0 ** (1 / 7), 1e-3 ** (1 / 7), count) ** 7
    times = jnp.concatenate([schedule.time(-2.0 * jnp.log(jnp.asarray(ratio))), jnp.zeros(1)])
    x = jnp.asarray([-1.0, 1.0]).reshape(2, 1, 1, 1)
    keys = jax.random.split(jax.random.key(0), 2)
    end = jax.jit(lambda x: solve(denoise, schedule, SOLVERS["heun"](), times, jnp.int32(count), x, keys))(x)
    low, high = np.asarray(end).reshape(2)
    return (high - low) / 2.0, (high + low) / 2.0, float(schedule.alpha(times[0])), float(schedule.sigma(times[0]))


@pytest.mark.parametrize("weight", [0.0, 1.0, 2.0, 3.5])
def test_guided_gaussians_have_the_closed_form_spread(schedule, weight, x64):
    """The guided ODE's standard deviation is s (s/S)^(w-1), where that of the sharpened density would be another.

    d ln(std) is the weighted sum of the models' own, so with V = alpha^2 s^2 + sigma^2 at the start the gain is
    (s / V^1/2)^w (S / V'^1/2)^(1-w).
    """
    s, S = 0.3, 0.8
    gain, _, alpha, sigma = gain_and_mean(schedule, guided(schedule, jnp.int32([0, 0]), jnp.float64(weight)))
    conditional, unconditional = np.hypot(alpha * s, sigma), np.hypot(alpha * S, sigma)
    np.testing.assert_allclose(gain, (s / conditional) ** weight * (S / unconditional) ** (1 - weight), rtol=1e-3)
    np.testing.assert_allclose(gain * sigma, s * (s / S) ** (weight - 1), rtol=2e-3)
    sharpened = (weight / s**2 + (1 - weight) / S**2) ** -0.5
    if weight not in (0.0, 1.0):
        assert abs(gain * sigma / sharpened - 1.0) > 0.05


def test_autoguidance_of_gaussians(x64):
    """A worse model of the same mean m, with std S > s: the mean stays, the spread is s (s/S)^(w-1).

    Both models are exact on alpha m, so x = alpha m stays on that line whatever the weight is.
    """
    schedule, m, s, S, weight = SCHEDULES["rectified_flow"](), 0.4, 0.3, 0.45, 2.5
    pair = strong_and_weak(of(schedule, m, s), of(schedule, m, S))
    gain, from_zero, alpha, sigma = gain_and_mean(schedule, guide(pair, schedule, jnp.float64(weight)))
    np.testing.assert_allclose(from_zero + gain * alpha * m, m, rtol=1e-3)
    np.testing.assert_allclose(gain * sigma, s * (s / S) ** (weight - 1), rtol=2e-3)


def test_guidances_stack(x64):
    """Away from the unlabelled model with weight w, then from a worse one with weight v: gains multiply as weights add.

    v w of the conditional's, v (1 - w) of the unlabelled one's and 1 - v of the worse one's.
    """
    schedule, s, S, bad, w, v = SCHEDULES["rectified_flow"](), 0.3, 0.8, 0.5, 1.5, 2.0
    by_label = guided(schedule, jnp.int32([0, 0]), jnp.float64(w))
    stacked = guide(strong_and_weak(by_label, of(schedule, 0.4, bad)), schedule, jnp.float64(v))
    gain, _, alpha, sigma = gain_and_mean(schedule, stacked)
    share = lambda std: std / np.hypot(alpha * std, sigma)
    np.testing.assert_allclose(gain, share(s) ** (v * w) * share(S) ** (v * (1 - w)) * share(bad) ** (1 - v), rtol=1e-3)


# ------------------------------------------------------------------------------------------ rules


def test_rules_are_applied_in_the_order_written():
    class Plus(Rule):
        def __call__(self, point, guided):
            return guided._replace(x0=guided.x0 + 1.0)

    class Twice(Rule):
        def __call__(self, point, guided):
            return guided._replace(x0=guided.x0 * 2.0)

    x, label = three()
    plain = guided_exact(x, label, 2.0).x0
    np.testing.assert_array_equal(guided_exact(x, label, 2.0, (Plus(), Twice())).x0, (plain + 1.0) * 2.0)
    np.testing.assert_array_equal(guided_exact(x, label, 2.0, (Twice(), Plus())).x0, plain * 2.0 + 1.0)


@pytest.mark.parametrize("rules", [*((text,) for text in RULES if text != "cfg_pp"), RULES[:-1]], ids=str)
def test_guided_parts_still_make_x(rules, schedule, x64):
    """alpha x0 + sigma eps is x: a rule that changes x0 derives eps again. CFG++ is the exception, by intent."""
    x = jax.random.normal(jax.random.key(2), (3, 2, 2, 1))
    for ratio in (0.1, 1.0, 10.0):
        t = schedule.time(jnp.asarray(-2.0 * np.log(ratio)))
        x0, eps = compiled(schedule, *rules)(x, t, jnp.int32([0, 1, NULL]), jnp.float64(4.0))
        np.testing.assert_allclose(schedule.alpha(t) * x0 + schedule.sigma(t) * eps, x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("interval", "ratio"),
    [("interval(low=1.0,high=1.0)", 1.0), ("interval(low=2.0)", 1.0), ("interval(high=0.5)", 1.0)],
)
def test_outside_of_its_interval_the_conditional_model_is_alone(interval, ratio):
    """To the bit and at the cost of one model; low = high covers nothing at all."""
    x, label = three()
    for others in ((), rules_of("rescaled", "apg(norm=0.1)")):
        rules = (*others, *rules_of(interval))
        np.testing.assert_array_equal(guided_exact(x, label, 3.0, rules)[:2], exact(x, None, label)[:2])
        assert sizes_of_batches(3.0, rules) == [3]
    assert sizes_of_batches(0.6, rules_of("cfg_pp", interval)) == [3]


def test_an_interval_is_one_of_sigma_over_alpha(schedule, x64):
    """low is outside, high is inside (Kynkaanniemi et al. 2024: sigma in (low, high]); the width does not matter."""
    x, label, weight = jax.random.normal(jax.random.key(2), (2, 2, 2, 1)), jnp.int32([0, 1]), jnp.float64(3.0)
    within = compiled(schedule, "interval(low=0.5,high=2.0)")
    for ratio, inside in ((0.499, False), (0.501, True), (1.0, True), (1.999, True), (2.001, False), (50.0, False)):
        t = schedule.time(jnp.asarray(-2.0 * np.log(ratio)))
        expected = compiled(schedule)(x, t, label, weight if inside else jnp.float64(1.0))
        np.testing.assert_array_equal(within(x, t, label, weight), expected)
    flow = SCHEDULES["rectified_flow"]()  # whose sigma / alpha is exact at t = 1/2
    for text, inside in (("interval(low=1.0)", False), ("interval(high=1.0)", True)):
        got = compiled(flow, text)(x, jnp.float64(0.5), label, weight)
        expected = compiled(flow)(x, jnp.float64(0.5), label, weight if inside else jnp.float64(1.0))
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("others", ["apg(momentum=-0.5)", "rescaled(phi=1.0)", "cfg_pp"])
@pytest.mark.parametrize("first", [True, False])
def test_an_interval_closes_guidance_wherever_it_stands(others, first, x64):
    """Image by image where each has its own time: outside, the conditional model's answer and the memory as it was."""
    schedule, x = SCHEDULES["rectified_flow"](), jax.random.normal(jax.random.key(4), (3, 2, 2, 1))
    conditional = of(schedule, 0.4, 0.3)
    interval = "interval(low=0.5,high=2.0)"
    rules = rules_of(interval, others) if first else rules_of(others, interval)
    run = guide(strong_and_weak(conditional, of(schedule, 0.0, 0.8)), schedule, jnp.float64(3.0), rules)
    t = jnp.asarray([0.1, 0.5, 0.9])  # sigma / alpha = 1/9, 1, 9
    memory = jax.tree.map(lambda m: m + 7.0, run.begin(x))
    d, renewed = run.recall(x, t, memory)
    for i, inside in enumerate((False, True, False)):
        same = np.array_equal(d.x0[i], conditional(x, t).x0[i]) and np.array_equal(d.eps[i], conditional(x, t).eps[i])
        assert same != inside
        assert all(
            np.array_equal(a[i], b[i]) != inside for a, b in zip(*map(jax.tree.leaves, (memory, renewed)), strict=True)
        )


def point(seed=3, weight=4.0, ratio=0.5):
    """(conditional x0, other x0, guided by plain classifier-free guidance) and a runner of rules, NumPy float64."""
    keys = jax.random.split(jax.random.key(seed), 3)
    x, c, o = (jax.random.normal(key, (3, 4, 4, 2)) for key in keys)
    schedule = SCHEDULES["rectified_flow"]()
    t = jnp.float64(ratio / (1.0 + ratio))

    def split(x0):
        return lambda x, t: Denoised(x0, (x - schedule.alpha(t) * x0) / schedule.sigma(t))

    def run(*texts):
        rules = rules_of(*texts)
        return guide(strong_and_weak(split(c), split(o)), schedule, jnp.float64(weight), rules)(x, t)

    return np.asarray(c), np.asarray(o), np.asarray(o + weight * (c - o)), run


def test_rescaled_as_the_paper_writes_it(x64):
    """Lin et al. 2023, section 3.4; np.std is of another library. At phi = 1 the deviation is the conditional's."""
    c, _, g, run = point()
    std = lambda a: a.std(axis=(1, 2, 3), keepdims=True)
    for phi in (0.0, 0.3, 1.0):
        expected = phi * g * std(c) / std(g) + (1 - phi) * g
        np.testing.assert_allclose(run(f"rescaled(phi={phi})").x0, expected, rtol=1e-12)
    np.testing.assert_allclose(std(np.asarray(run("rescaled(phi=1.0)").x0)), std(c), rtol=1e-12)
    assert np.all(std(g) > 1.5 * std(c))


def test_an_image_of_one_colour_is_not_rescaled():
    flat = lambda value: lambda x, t: Denoised(jnp.full_like(x, value), x)
    pair = strong_and_weak(flat(0.5), flat(0.25))
    run = guide(pair, SCHEDULES["cosine"](), jnp.float32(3.0), rules_of("rescaled(phi=1.0)"))
    np.testing.assert_array_equal(run(jnp.ones((2, 2, 2, 1)), jnp.float32(0.5)).x0, 1.0)


def test_apg_as_the_paper_writes_it(x64):
    """Sadat et al. 2024: D_c + (w - 1) (orthogonal + eta parallel) of D_c - D_u, shortened to at most r."""
    c, o, g, run = point()
    rows = lambda a: a.reshape(3, -1)
    delta, unit = rows(c - o), rows(c) / np.linalg.norm(rows(c), axis=1, keepdims=True)
    length = np.linalg.norm(delta, axis=1, keepdims=True)
    r = float(np.median(length))  # one image is shortened, one is not
    assert length.min() < r < length.max()
    for eta, norm in ((0.0, r), (0.4, 0.5), (0.0, 1e3), (1.0, 2.0)):
        short = delta * np.minimum(1.0, norm / length)
        parallel = np.sum(short * unit, axis=1, keepdims=True) * unit
        expected = rows(c) + 3.0 * (short - parallel + eta * parallel)
        np.testing.assert_allclose(rows(run(f"apg(eta={eta},norm={norm})").x0), expected, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(run("apg(eta=1.0)").x0, g, rtol=1e-12)  # eta = 1 without a limit is classifier-free
    push = rows(np.asarray(run("apg(eta=0.0)").x0) - c)
    np.testing.assert_allclose(np.sum(push * unit, axis=1), 0.0, atol=1e-12)  # at eta = 0 orthogonal to D_c
    assert np.all(np.abs(np.sum(rows(g - c) * unit, axis=1)) > 0.1)


def test_apg_of_black_images_and_equal_models_is_finite():
    black, grey = (lambda v: lambda x, t: Denoised(jnp.full_like(x, v), x))(0.0), lambda x, t: Denoised(0.5 * x, x)
    x = jnp.ones((2, 2, 2, 1))
    for pair in (strong_and_weak(black, grey), strong_and_weak(black, black), strong_and_weak(grey, grey)):
        d = guide(pair, SCHEDULES["cosine"](), jnp.float32(3.0), rules_of("apg(norm=1.0)"))(x, jnp.float32(0.5))
        assert np.all(np.isfinite(np.asarray(d[:2])))


@pytest.mark.parametrize("momentum", [-0.75, 0.5])
def test_apg_with_momentum_as_the_paper_writes_it(momentum, x64):
    """Sadat et al. 2024, algorithm 1, over 6 DDIM steps in NumPy: the difference is summed up before all else."""
    schedule, times = SCHEDULES["rectified_flow"](), np.linspace(0.95, 0.05, 7)
    start, weight, eta, norm = np.random.default_rng(0).normal(size=(3, 4, 4, 2)), 3.0, 0.3, 2.0
    inner = lambda a, b: np.sum(a * b, axis=(1, 2, 3), keepdims=True)

    def step(x, t, s, total):
        c, o = (np.asarray(of(schedule, m, std)(x, jnp.float64(t)).x0) for m, std in ((0.4, 0.3), (0.0, 0.8)))
        total = c - o + momentum * total
        short = total * np.minimum(1.0, norm / np.sqrt(inner(total, total)))
        parallel = inner(short, c) / inner(c, c) * c
        x0 = c + (weight - 1.0) * (short - parallel + eta * parallel)
        return (1.0 - s) * x0 + s * (x - (1.0 - t) * x0) / t, total

    expected, total = start, np.zeros_like(start)
    for t, s in itertools.pairwise(times):
        expected, total = step(expected, t, s, total)

    def run(text, solver="ddim"):
        pair = strong_and_weak(of(schedule, 0.4, 0.3), of(schedule, 0.0, 0.8))
        denoise = guide(pair, schedule, jnp.float64(weight), rules_of(text))
        keys, x = jax.random.split(jax.random.key(0), 3), jnp.asarray(start)
        remembering = carried(SOLVERS[solver](), denoise, x)
        return solve(denoise, schedule, remembering, jnp.asarray(times), jnp.int32(6), x, keys)

    with_momentum = f"apg(eta={eta},norm={norm},momentum={momentum})"
    np.testing.assert_allclose(run(with_momentum), expected, rtol=1e-9, atol=1e-12)
    assert not np.allclose(run(f"apg(eta={eta},norm={norm})"), expected, rtol=1e-3)
    assert not np.allclose(run(with_momentum, "heun"), run(f"apg(eta={eta},norm={norm})", "heun"), rtol=1e-3)


@pytest.mark.parametrize(("solver", "per_step"), [("ddim", 1), ("heun", 2), ("dpmpp_2m", 1), ("unipc", 1)])
def test_memory_costs_no_evaluation(solver, per_step):
    """Where a solver asks first where its step begins, the answer is the one that the memory was renewed with."""
    schedule, asked = SCHEDULES["cosine"](), []

    def model(x, t):
        asked.append(1)
        return Denoised(0.5 * x, x)

    def step(x):
        denoise = guide(strong_and_weak(model, model), schedule, jnp.float32(2.0), rules_of("apg(momentum=-0.5)"))
        remembering = carried(SOLVERS[solver](), denoise, x)
        keys = jax.random.split(jax.random.key(0), 2)
        times = jnp.float32([0.8, 0.5])
        return remembering.step(denoise, schedule, x, *times, remembering.init(x), keys)[0]

    with jax.disable_jit():
        step(jnp.ones((2, 2, 2, 1)))
    assert len(asked) == 2 * per_step


def test_without_a_memory_the_solver_is_the_plain_one():
    pair, solver = strong_and_weak(lambda x, t: Denoised(x, x), lambda x, t: Denoised(x, x)), SOLVERS["heun"]()
    denoise = guide(pair, SCHEDULES["cosine"](), jnp.float32(2.0), rules_of("interval", "rescaled"))
    assert carried(solver, denoise, jnp.ones((1, 2, 2, 1))) is solver


def curve(schedule, t):
    return float(schedule.alpha(t)), float(schedule.sigma(t))


@pytest.mark.parametrize("weight", [0.0, 0.6, 1.0])
def test_cfg_pp_as_the_paper_writes_it(schedule, weight, x64):
    """Chung et al. 2024, algorithm 2: Tweedie's formula with the guided eps, renoised with the unconditional one.

    And the plain guidance that makes the same DDIM step has the weight w / (1 - alpha_t sigma_s / (alpha_s sigma_t)):
    with d the difference of the x0, plain guidance adds w d (alpha_s - sigma_s alpha_t / sigma_t), CFG++ w d alpha_s.
    """
    x, label = jax.random.normal(jax.random.key(2), (2, 2, 2, 1)), jnp.int32([0, 1])
    t, s = (schedule.time(jnp.asarray(-2.0 * np.log(ratio))) for ratio in (2.0, 0.7))
    (alpha_t, sigma_t), (alpha_s, sigma_s) = curve(schedule, t), curve(schedule, s)
    eps_c, eps_u = (np.asarray(of(schedule, m, std)(x, t).eps) for m, std in ((0.4, 0.3), (0.0, 0.8)))

    tweedie = (x - sigma_t * (eps_u + weight * (eps_c - eps_u))) / alpha_t
    expected = alpha_s * tweedie + sigma_s * eps_u

    def step(w, *rules):
        """One DDIM step."""
        x0, eps = compiled(schedule, *rules)(x, t, label, jnp.float64(w))
        return alpha_s * x0 + sigma_s * eps

    np.testing.assert_allclose(step(weight, "cfg_pp"), expected, rtol=1e-10)
    equal_weight = weight / (1.0 - alpha_t * sigma_s / (alpha_s * sigma_t))
    np.testing.assert_allclose(step(equal_weight), expected, rtol=1e-9, atol=1e-12)
    if weight == 1.0:  # not the conditional model, which plain guidance is there
        assert not np.allclose(expected, step(1.0), rtol=0.05)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("interval(low=2.0,high=1.0)", "low <= high"),
        ("interval(low=-1.0)", "0 <= low"),
        ("rescaled(phi=1.5)", "phi must lie"),
        ("apg(norm=0.0)", "norm must be positive"),
        ("apg(momentum=-1.0)", "momentum must lie"),
        ("intervall", "did you mean 'interval'"),
        ("rescaled(psi=0.5)", "phi"),
    ],
)
def test_impossible_rules(text, message):
    with pytest.raises(UserError, match=rf"sample.rules.*{message}"):
        rules_of(text)


# ------------------------------------------------------------------------------------------ classifiers


TWO_CLASSES = ((-0.7, 0.6), (0.4, 0.4), (0.3, 0.7))  # means, stds, shares: of equal deviation


def bayes(schedule, label):
    """log p(label | x_t) up to a constant, and exact: log share_k - (x - alpha m_k)^2 / 2 V, normalised."""
    means, (std, _), shares = TWO_CLASSES

    def log_probability(x, t):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        x = x.reshape(-1, 1)
        off = x - alpha * jnp.asarray([means])
        scores = jnp.log(jnp.asarray([shares])) - 0.5 * off**2 / (alpha**2 * std**2 + sigma**2)
        return jnp.take_along_axis(jax.nn.log_softmax(scores), label[:, None], axis=1)[:, 0]

    return log_probability


def test_bayes_with_an_exact_classifier(schedule, x64):
    """Weight 1 makes the conditional model of the unconditional one, weight 0 leaves it (eps' = eps - w sigma g)."""
    label = jnp.int32([0, 1, 1, 0])
    x = jnp.asarray([-1.0, -0.3, 0.8, 2.0]).reshape(4, 1, 1, 1)
    plain = mixture(schedule, tuple(jnp.asarray(a) for a in TWO_CLASSES))
    means = jnp.asarray(TWO_CLASSES[0])[label].reshape(4, 1, 1, 1)
    run = jax.jit(lambda x, t, w: by_classifier(plain, schedule, bayes(schedule, label), w)(x, t)[:2])
    for ratio in (0.01, 0.5, 1.0, 5.0, 60.0):
        t = schedule.time(jnp.asarray(-2.0 * np.log(ratio)))
        np.testing.assert_allclose(run(x, t, jnp.float64(1.0)), of(schedule, means, 0.4)(x, t)[:2], rtol=1e-6)
        np.testing.assert_array_equal(run(x, t, jnp.float64(0.0)), jax.jit(plain)(x, t)[:2])
        x0, eps = run(x, t, jnp.float64(3.0))
        np.testing.assert_allclose(schedule.alpha(t) * x0 + schedule.sigma(t) * eps, x, rtol=1e-9, atol=1e-9)


def test_a_classifier_that_errs_does_no_harm_where_there_is_no_image(x64):
    """At alpha = 0 (rectified flow, t = 1) sigma^2 / alpha is infinite: the step from there is the plain model's."""
    schedule, x = SCHEDULES["rectified_flow"](), jnp.ones((2, 1, 1, 1))
    plain = of(schedule, 0.4, 0.3)
    errs = lambda x, t: jnp.sum(x**2, axis=(1, 2, 3))
    got = by_classifier(plain, schedule, errs, jnp.float64(2.0))(x, jnp.float64(1.0))
    np.testing.assert_array_equal(got[:2], plain(x, jnp.float64(1.0))[:2])
