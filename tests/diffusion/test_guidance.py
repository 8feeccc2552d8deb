"""Guidance and clipping: identities to the bit, and the closed form for Gaussians."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import plugs
from diffusion_jax.diffusion import guidance
from diffusion_jax.diffusion.schedule import SCHEDULES
from diffusion_jax.diffusion.solvers import SOLVERS
from diffusion_jax.diffusion.solvers.base import solve
from diffusion_jax.types import Denoised

NULL = 9


def of(schedule, mean, std):
    """The ideal denoiser of N(mean, std^2) a pixel; mean and std may be one an example."""

    def denoise(x, t):
        alpha, sigma = (jnp.full((1, 1, 1, 1), c, x.dtype) for c in (schedule.alpha(t), schedule.sigma(t)))
        off = (x - alpha * mean) / (alpha**2 * std**2 + sigma**2)
        return Denoised(mean + alpha * std**2 * off, sigma * off)

    return denoise


def two_gaussians(schedule, m=0.4, s=0.3, S=0.8):  # noqa: N803
    """Under its label N(m, s^2), without one N(0, S^2)."""

    def denoise(x, t, label):
        null = (label == NULL).reshape(-1, 1, 1, 1)
        return of(schedule, jnp.where(null, 0.0, m).astype(x.dtype), jnp.where(null, S, s).astype(x.dtype))(x, t)

    return denoise


def guided(schedule, label, weight):
    return guidance.classifier_free(two_gaussians(schedule), label, NULL, weight)


@functools.cache
def compiled(schedule):
    """(x, t, label, weight) -> the guided (x0, eps)."""
    return jax.jit(lambda x, t, label, weight: guided(schedule, label, weight)(x, t)[:2])


@pytest.fixture(params=SCHEDULES)
def schedule(request):
    return plugs.build("schedule", request.param, SCHEDULES)


def exact(x, t, label):
    """A model whose only roundings are its sums', so that no compiler may round it differently."""
    offset = label.astype(x.dtype).reshape(-1, 1, 1, 1)
    return Denoised(0.5 * x + offset, 2.0 * x - offset)


def test_weight_one_is_the_conditional_model_to_the_bit():
    """Where uncond + 1 (cond - uncond), rounded, is not."""
    x, label = jax.random.normal(jax.random.key(0), (3, 8, 8, 1)), jnp.int32([0, 3, 8])
    got = guidance.classifier_free(exact, label, NULL, jnp.float32(1.0))(x, jnp.float32(0.5))
    conditional, unconditional = exact(x, None, label), exact(x, None, jnp.full_like(label, NULL))
    np.testing.assert_array_equal(got[:2], conditional[:2])
    assert np.any(np.asarray(unconditional[0] + (conditional[0] - unconditional[0])) != conditional[0])


def test_weight_zero_is_the_unconditional_model_to_the_bit():
    x, label = jax.random.normal(jax.random.key(0), (3, 8, 8, 1)), jnp.int32([0, 3, 8])
    got = guidance.classifier_free(exact, label, NULL, jnp.float32(0.0))(x, jnp.float32(0.5))
    np.testing.assert_array_equal(got[:2], exact(x, None, jnp.full_like(label, NULL))[:2])


def test_weight_one_costs_one_evaluation_of_the_batch():
    """No doubled batch: what runs under disable_jit is what the branch at run time takes."""
    sizes = []

    def denoise(x, t, label):
        sizes.append(x.shape[0])
        return Denoised(x, x)

    with jax.disable_jit():
        for weight in (1.0, 1.5):
            run = guidance.classifier_free(denoise, jnp.int32([1, 2, 3]), NULL, jnp.float32(weight))
            run(jnp.ones((3, 2, 2, 1)), jnp.float32(0.5))
    assert sizes == [3, 6]


def test_linear_in_the_weight(schedule, x64):
    x, label, t = jax.random.normal(jax.random.key(1), (5, 2, 2, 1)), jnp.int32([0, 1, 2, 3, 4]), jnp.float64(0.6)
    at = lambda w: np.asarray(compiled(schedule)(x, t, label, jnp.float64(w)))
    assert not np.allclose(at(0.0), at(1.0))
    for weight in (-0.5, 0.3, 2.0, 7.5):
        np.testing.assert_allclose(at(weight), at(0.0) + weight * (at(1.0) - at(0.0)), rtol=1e-10, atol=1e-12)


def test_examples_do_not_see_each_other(schedule, x64):
    """The doubled batch is undone in order: with one label an example, all others may change."""
    x, t, weight = jax.random.normal(jax.random.key(1), (5, 2, 2, 1)), jnp.float64(0.6), jnp.float64(3.0)
    label = jnp.int32([4, NULL, 0, NULL, 2])
    whole = np.asarray(compiled(schedule)(x, t, label, weight))
    for i in range(5):
        keep = jnp.arange(5) == i
        others = compiled(schedule)(
            jnp.where(keep.reshape(5, 1, 1, 1), x, 9.0), t, jnp.where(keep, label, NULL - label), weight
        )
        np.testing.assert_allclose(np.asarray(others)[:, i], whole[:, i], rtol=1e-12)
    unlabelled = of(schedule, 0.0, 0.8)(x, t)[:2]
    np.testing.assert_allclose(whole[:, 1], np.asarray(unlabelled)[:, 1], rtol=1e-10)
    assert not np.allclose(whole[:, 0], np.asarray(unlabelled)[:, 0])


def test_weight_is_traced():
    schedule, traces = plugs.build("schedule", "cosine", SCHEDULES), []

    @jax.jit
    def run(weight, x):
        traces.append(1)
        return guided(schedule, jnp.int32([1]), weight)(x, jnp.float32(0.5))

    first, second = (run(jnp.float32(w), jnp.ones((1, 2, 2, 1)))[0] for w in (1.0, 4.0))
    assert len(traces) == 1
    assert not np.allclose(first, second)


@pytest.mark.parametrize("weight", [0.0, 1.0, 2.0, 3.5])
def test_guided_gaussians_have_the_closed_form_spread(schedule, weight, x64):
    """The guided ODE's standard deviation is s (s/S)^(w-1), where that of the sharpened density would be another.

    The flow is affine, so two starting points give its gain exactly. d ln(std) is the weighted sum of the models' own,
    so with V = alpha^2 s^2 + sigma^2 at the start the gain is (s / V^1/2)^w (S / V'^1/2)^(1-w).
    """
    s, S, count = 0.3, 0.8, 600
    ratio = np.linspace(60.0 ** (1 / 7), 1e-3 ** (1 / 7), count) ** 7
    times = jnp.concatenate([schedule.time(-2.0 * jnp.log(jnp.asarray(ratio))), jnp.zeros(1)])
    denoise = guided(schedule, jnp.int32([0, 0]), jnp.float64(weight))
    x = jnp.asarray([-1.0, 1.0]).reshape(2, 1, 1, 1)
    keys = jax.random.split(jax.random.key(0), 2)
    end = jax.jit(lambda x: solve(denoise, schedule, SOLVERS["heun"](), times, jnp.int32(count), x, keys))(x)
    gain = float(end[1, 0, 0, 0] - end[0, 0, 0, 0]) / 2.0

    alpha, sigma = float(schedule.alpha(times[0])), float(schedule.sigma(times[0]))
    conditional, unconditional = np.hypot(alpha * s, sigma), np.hypot(alpha * S, sigma)
    np.testing.assert_allclose(gain, (s / conditional) ** weight * (S / unconditional) ** (1 - weight), rtol=1e-3)
    np.testing.assert_allclose(gain * sigma, s * (s / S) ** (weight - 1), rtol=2e-3)
    sharpened = (weight / s**2 + (1 - weight) / S**2) ** -0.5
    if weight not in (0.0, 1.0):
        assert abs(gain * sigma / sharpened - 1.0) > 0.05


@pytest.mark.parametrize("bound", [0.1, 1.0])
def test_clipped_parts_still_make_x(schedule, bound, x64):
    """|x0| <= bound, and alpha x0 + sigma eps is x: eps is derived again."""
    denoise, clipped = guidance.clip(of(schedule, 0.0, 2.0), schedule, jnp.float64(bound)), 0
    for t in (1e-3, 0.3, 0.7, 1.0):
        t = jnp.float64(t)
        x = 3.0 * jnp.hypot(schedule.alpha(t), schedule.sigma(t)) * jax.random.normal(jax.random.key(3), (4, 3, 3, 1))
        x0, eps, _ = denoise(x, t)
        assert np.abs(x0).max() <= bound
        np.testing.assert_allclose(schedule.alpha(t) * x0 + schedule.sigma(t) * eps, x, rtol=1e-9, atol=1e-9)
        clipped += int(np.sum(np.asarray(x0) != np.asarray(of(schedule, 0.0, 2.0)(x, t)[0])))
    assert clipped > 10


def test_clipping_leaves_what_is_inside(schedule):
    x = jax.random.normal(jax.random.key(3), (4, 3, 3, 1))
    for t in (1e-3, 0.5, 1.0):
        free = of(schedule, 0.0, 0.5)(x, jnp.float32(t))[:2]
        infinite = guidance.clip(of(schedule, 0.0, 0.5), schedule, jnp.float32(jnp.inf))(x, jnp.float32(t))[:2]
        wide = guidance.clip(of(schedule, 0.0, 0.5), schedule, jnp.float32(1e6))(x, jnp.float32(t))[:2]
        np.testing.assert_array_equal(infinite, free)
        np.testing.assert_array_equal(wide, free)


def test_clipping_takes_one_time_an_example(schedule):
    x = 5.0 * jax.random.normal(jax.random.key(3), (3, 2, 2, 1))
    t = jnp.float32([0.2, 0.6, 1.0])
    fixed = lambda x, t: Denoised(2.0 * jnp.ones_like(x), jnp.zeros_like(x))
    whole = np.asarray(guidance.clip(fixed, schedule, jnp.float32(1.0))(x, t)[:2])
    for i in range(3):
        alone = guidance.clip(fixed, schedule, jnp.float32(1.0))(x[i : i + 1], t[i])[:2]
        np.testing.assert_allclose(alone, whole[:, i : i + 1], rtol=1e-6)


def test_guided_and_clipped_is_finite_from_end_to_end(schedule):
    label = jnp.int32([0, 1])
    run = jax.jit(guidance.clip(guided(schedule, label, jnp.float32(8.0)), schedule, jnp.float32(1.0)))
    x = 2.0 * schedule.sigma(jnp.float32(1.0)) * jax.random.normal(jax.random.key(3), (2, 2, 2, 1))
    for t in (1.0, 0.999, 0.5, 1e-2, 1e-4, 1e-6):
        assert np.all(np.isfinite(np.asarray(run(x, jnp.float32(t))[:2])))
