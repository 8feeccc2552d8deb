"""The denoising objective: at the ideal denoiser of Gaussian data its value is known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from diffusion_jax import plugs, rng
from diffusion_jax.diffusion.objectives.denoising import Denoising
from diffusion_jax.diffusion.prediction import PREDICTIONS, check_pairing
from diffusion_jax.diffusion.time_sampling import TIME_SAMPLINGS
from diffusion_jax.diffusion.weighting import WEIGHTINGS
from diffusion_jax.errors import UserError
from tests import schedules

MEAN, STD, COUNT, SIDE = 0.3, 0.6, 8192, 4


def published_floor(name, schedule, t):
    """Var(y | x) for x0 ~ N(., s^2), with V = alpha^2 s^2 + sigma^2.

    With alpha^2 + sigma^2 = 1, v's is s^2 / V; where that does not hold the factor (alpha^2 + sigma^2)^2 stays.
    """
    alpha, sigma = np.asarray(schedule.alpha(t)), np.asarray(schedule.sigma(t))
    variance = alpha**2 * STD**2 + sigma**2
    if name == "velocity":
        h = 1e-6
        slope = lambda f: np.asarray(f(t + h) - f(t - h)) / (2 * h)
        return (slope(schedule.alpha) * sigma - slope(schedule.sigma) * alpha) ** 2 * STD**2 / variance
    return {
        "eps": alpha**2 * STD**2 / variance,
        "score": (alpha / sigma) ** 2 * STD**2 / variance,
        "x0": STD**2 * sigma**2 / variance,
        "v": (alpha**2 + sigma**2) ** 2 * STD**2 / variance,
        "edm": (sigma**2 + 0.25 * alpha**2) / 0.25 * STD**2 / variance,
    }[name]


def _pairings():
    for schedule in schedules.EVERY:
        for name in PREDICTIONS:
            try:
                check_pairing("prediction", build(name, schedule), "")
            except UserError:
                continue
            yield name, schedule


def build(prediction, schedule):
    return PREDICTIONS[prediction](schedule=schedules.build(schedule))


PAIRINGS = list(_pairings())


def ideal(prediction):
    """The conditional mean of y given x: no network can do better."""
    schedule = prediction.schedule

    def predict(x, t):
        alpha, sigma = (c.reshape(-1, 1, 1, 1) for c in (schedule.alpha(t), schedule.sigma(t)))
        off = (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)
        return prediction.target(MEAN + alpha * STD**2 * off, sigma * off, t)

    return predict


def shifted(prediction):
    """The ideal output, off by one standard deviation of what it cannot know."""
    best, schedule = ideal(prediction), prediction.schedule

    def predict(x, t):
        alpha, sigma = (c.reshape(-1, 1, 1, 1) for c in (schedule.alpha(t), schedule.sigma(t)))
        u = STD / jnp.sqrt(alpha**2 * STD**2 + sigma**2) * jnp.ones_like(x)
        return best(x, t) + prediction.target(sigma * u, -alpha * u, t)

    return predict


def objective(prediction, time_sampling="uniform", weighting="simple"):
    return Denoising(
        prediction=prediction,
        time_sampling=plugs.build("time", time_sampling, TIME_SAMPLINGS),
        weighting=plugs.build("weighting", weighting, WEIGHTINGS),
    )


def losses(cases, count=COUNT):
    """{name: (objective, predict)} -> {name: (losses, times)}; the draws are shared."""
    keys = rng.example_keys(jax.random.key(0), jnp.arange(count))
    x0 = MEAN + STD * jax.random.normal(jax.random.key(1), (count, SIDE, SIDE, 1))
    u = rng.uniform(rng.fold(keys, 9))
    found = {name: case.loss(predict, x0, u, keys) for name, (case, predict) in cases.items()}
    return jax.tree.map(lambda a: np.asarray(a, np.float64), found)


@functools.cache
def measured(schedule):
    """Losses of every prediction that goes with the schedule, at the ideal denoiser and beside it."""
    bound = {name: build(name, schedule) for name, other in PAIRINGS if other == schedule}
    return losses(
        {(name, "ideal"): (objective(prediction), ideal(prediction)) for name, prediction in bound.items()}
        | {(name, "shifted"): (objective(prediction), shifted(prediction)) for name, prediction in bound.items()}
    )


def floors(name, prediction, t):
    """Var(y | x) from y = a x0 + b eps for any prediction, and the published form where there is one."""
    with jax.enable_x64(True):
        t = jnp.asarray(t)
        one, zero = jnp.ones((len(t), 1, 1, 1)), jnp.zeros((len(t), 1, 1, 1))
        a, b = (np.asarray(prediction.target(*pair, t)).ravel() for pair in ((one, zero), (zero, one)))
        alpha, sigma = np.asarray(prediction.schedule.alpha(t)), np.asarray(prediction.schedule.sigma(t))
        # x0 and eps given x are one normal variable u: x0 = sigma u, eps = -alpha u, u's variance s^2 / V.
        floor = (a * sigma - b * alpha) ** 2 * STD**2 / (alpha**2 * STD**2 + sigma**2)
        # at a step of 1000 a discrete schedule has a corner, and `published_floor`'s finite differences no meaning
        smooth = np.abs(1000 * t - np.round(1000 * t)) > 2e-3
        published = published_floor(name, prediction.schedule, t)
        np.testing.assert_allclose(floor[smooth], published[smooth], rtol=1e-4)
    return floor


def check_floor(name, prediction, losses, t):
    """Each loss over its floor is chi^2_16 / 16: over 8,192 examples the mean is 1 +- 0.004. Tolerance 4 such errors.

    The ratio's spread must be chi^2's too, sqrt(2/16) = 0.354, or the floor would only be met on average.
    """
    ratio = losses / floors(name, prediction, t)
    np.testing.assert_allclose(ratio.mean(), 1.0, atol=4 * np.sqrt(2.0 / SIDE**2 / COUNT))
    np.testing.assert_allclose(ratio.std(), np.sqrt(2.0 / SIDE**2), rtol=0.06)


@pytest.mark.parametrize(("name", "schedule"), [pytest.param(*pair, marks=schedules.marks(*pair)) for pair in PAIRINGS])
def test_loss_at_the_ideal_denoiser_is_its_floor(name, schedule):
    check_floor(name, build(name, schedule), *measured(schedule)[name, "ideal"])


@pytest.mark.parametrize("time_sampling", TIME_SAMPLINGS)
def test_floor_under_every_time_sampling(time_sampling):
    prediction = build("v", "cosine")
    case = {"it": (objective(prediction, time_sampling), ideal(prediction))}
    check_floor("v", prediction, *losses(case)["it"])


@pytest.mark.parametrize(("name", "schedule"), [pytest.param(*pair, marks=schedules.marks(*pair)) for pair in PAIRINGS])
def test_any_other_denoiser_is_worse(name, schedule):
    """By the square of what it is off: one standard deviation doubles the loss (the cross term's error: 0.006)."""
    loss, t = measured(schedule)[name, "shifted"]
    np.testing.assert_allclose((loss / floors(name, build(name, schedule), t)).mean(), 2.0, atol=0.04)


DENSITIES = {
    "uniform": lambda ratio, slope: 1.0,
    "log_normal": lambda ratio, slope: stats.norm.pdf(np.log(ratio), -1.2, 1.2) * slope,
}
"""name -> p(t), from sigma / alpha and the slope of its logarithm in t."""


@pytest.mark.parametrize("time_sampling", DENSITIES)
def test_loss_carries_its_weight(time_sampling):
    """And divides by the density of the times where a weighting asks for that; here on the cosine's angle."""
    prediction = build("v", "cosine")
    cases = {text: (objective(prediction, time_sampling, text), ideal(prediction)) for text in WEIGHTINGS}
    found = losses(cases, count=64)
    plain, t = found["simple"]
    angle = np.pi / 2 - np.arctan(np.exp(-10.0))
    p = DENSITIES[time_sampling](np.tan(angle * t), 2.0 * angle / np.sin(2.0 * angle * t))
    t32, slope = jnp.asarray(t, jnp.float32), jnp.asarray(np.broadcast_to(1.0 / p, t.shape), jnp.float32)
    for text, (weighted, again) in found.items():
        np.testing.assert_array_equal(t, again)
        weight = plugs.build("weighting", text, WEIGHTINGS)(prediction, t32, slope)
        np.testing.assert_allclose(weighted, plain * np.asarray(weight), rtol=2e-3)


@pytest.mark.parametrize("time_sampling", TIME_SAMPLINGS)
def test_a_loss_depends_on_its_own_example_and_key(time_sampling):
    case = objective(build("velocity", "rectified_flow"), time_sampling)
    keys = rng.example_keys(jax.random.key(0), jnp.arange(6))
    x0 = jax.random.normal(jax.random.key(1), (6, SIDE, SIDE, 1))
    program = jax.jit(lambda x0, keys: case.loss(lambda x, t: 0.5 * x, x0, rng.uniform(rng.fold(keys, 9)), keys)[0])
    loss = lambda x0, keys: np.asarray(program(x0, keys))
    whole = loss(x0, keys)
    assert whole.shape == (6,)
    order = np.array([4, 1, 5, 0, 2, 3])
    np.testing.assert_allclose(loss(x0[order], keys[order]), whole[order], rtol=1e-6)
    others = loss(x0.at[0].add(1.0), keys.at[1].set(jax.random.key(77)))
    np.testing.assert_allclose(others[2:], whole[2:], rtol=1e-6)
    assert abs(others[0] / whole[0] - 1.0) > 1e-3
    assert abs(others[1] / whole[1] - 1.0) > 1e-3


def test_time_and_noise_are_drawn_independently():
    """Correlation of |noise|^2 with t, over 8,192 examples: 0 +- 0.011."""
    seen = []

    def predict(x, t):
        seen.append((x, t))
        return x

    keys = rng.example_keys(jax.random.key(0), jnp.arange(COUNT))
    objective(build("x0", "edm")).loss(predict, jnp.zeros((COUNT, SIDE, SIDE, 1)), rng.uniform(rng.fold(keys, 9)), keys)
    x, t = (np.asarray(a, np.float64) for a in seen[0])
    noise = x[:, :, :, 0] / (80.0 * t[:, None, None])
    assert abs(np.corrcoef((noise**2).mean((1, 2)), t)[0, 1]) < 0.05
    assert abs(np.corrcoef(noise[:, 0, 0], t)[0, 1]) < 0.05
    np.testing.assert_allclose(noise.mean(), 0.0, atol=4 / np.sqrt(noise.size))
    np.testing.assert_allclose(noise.var(), 1.0, atol=4 * np.sqrt(2 / noise.size))
