"""What changes guidance: each rule as its paper writes it, in NumPy, and what all of them leave alone."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import plugs
from diffusion_jax.diffusion.guidance import (
    GUIDANCE_RULES,
    Rule,
    carried,
    guide,
    strong_and_weak,
)
from diffusion_jax.diffusion.schedule import SCHEDULES
from diffusion_jax.diffusion.solvers import SOLVERS
from diffusion_jax.diffusion.solvers.base import solve
from diffusion_jax.errors import UserError
from diffusion_jax.types import Denoised
from tests.diffusion.guided import (
    NAMES,
    NULL,
    RULES,
    compiled,
    exact,
    guided_exact,
    of,
    rules_of,
    sizes_of_batches,
    three,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(params=NAMES)
def schedule(request):
    return plugs.build("schedule", request.param, SCHEDULES)


def test_every_rule_is_tested():
    assert {plugs.parse("", text)[0] for text in RULES} == set(GUIDANCE_RULES)


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
