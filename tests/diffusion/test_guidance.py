"""Guidance: identities to the bit, and closed forms for Gaussians; by labels, by a worse model, by a classifier."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import plugs
from diffusion_jax.diffusion.guidance import (
    GUIDANCE_RULES,
    by_classifier,
    guide,
    strong_and_weak,
    with_and_without_label,
)
from diffusion_jax.diffusion.schedule import SCHEDULES
from diffusion_jax.diffusion.solvers import SOLVERS
from diffusion_jax.diffusion.solvers.base import solve
from diffusion_jax.types import Denoised
from tests.contracts.closed_form import mixture
from tests.diffusion.guided import (
    NAMES,
    NULL,
    RULES,
    compiled,
    exact,
    guided,
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


# ------------------------------------------------------------------------------------------ classifier-free


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
