"""Predictions: round trips, published coefficients, and pairings that must be refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import plugs
from diffusion_jax.diffusion.prediction import PREDICTIONS, check_pairing
from diffusion_jax.diffusion.schedule import first_time
from diffusion_jax.errors import UserError
from tests import schedules

PAIRINGS = [(p, s) for p in PREDICTIONS for s in schedules.EVERY]


def rows(pairs):
    return [pytest.param(*pair, marks=schedules.marks(*pair)) for pair in pairs]


def build(prediction, schedule):
    return plugs.build("prediction", prediction, PREDICTIONS, schedule=schedules.build(schedule))


def allowed(prediction, schedule):
    try:
        check_pairing("prediction", build(prediction, schedule), "")
    except UserError:
        return False
    return True


def images(seed, count):
    generator = np.random.default_rng(seed)
    return (jnp.asarray(generator.normal(size=(count, 2, 3, 1))) for _ in range(2))


def over(t):
    return t[:, None, None, None]


NO_SIGNAL_AT_THE_END = ("gvp", "rectified_flow", "resolution_shifted", "zero_terminal_snr")


def test_which_pairings_are_refused():
    """Noise says nothing of the image where alpha is 0; all others have D = 1, -sigma, S / sigma_data or a product."""
    refused = {pair for pair in PAIRINGS if not allowed(*pair)}
    assert refused == {(name, schedule) for name in ("eps", "score") for schedule in NO_SIGNAL_AT_THE_END}


@pytest.mark.parametrize(("name", "schedule"), rows(PAIRINGS))
def test_a_pairing_is_refused_where_it_does_not_determine_the_image(name, schedule, x64):
    """x = alpha x0 + sigma eps and y = a x0 + b eps as a matrix: usable iff no used time makes it singular."""
    prediction = build(name, schedule)
    t = jnp.linspace(first_time(prediction.schedule).astype(jnp.float64), 1.0, 2001)
    one, zero = jnp.ones((len(t), 1, 1, 1)), jnp.zeros((len(t), 1, 1, 1))
    rows = [
        [prediction.schedule.alpha(t), prediction.schedule.sigma(t)],
        [prediction.target(one, zero, t).ravel(), prediction.target(zero, one, t).ravel()],
    ]
    smallest = np.abs(np.linalg.det(np.asarray(rows).transpose(2, 0, 1))).min()
    assert allowed(name, schedule) == (smallest > 1e-6)


def test_refusal_names_both():
    with pytest.raises(UserError, match=r"family.prediction.*eps with rectified_flow.*t = 1"):
        check_pairing("family.prediction", build("eps", "rectified_flow"), "eps with rectified_flow")


@pytest.mark.parametrize(("name", "schedule"), rows(pair for pair in PAIRINGS if allowed(*pair)))
def test_split_inverts_target(name, schedule, x64):
    prediction = build(name, schedule)
    t = jnp.concatenate([first_time(prediction.schedule).astype(jnp.float64)[None], jnp.linspace(0.01, 1.0, 30)])
    x0, eps = images(0, len(t))
    x = over(prediction.schedule.alpha(t)) * x0 + over(prediction.schedule.sigma(t)) * eps
    got = prediction.split(x, prediction.target(x0, eps, t), t)
    np.testing.assert_allclose(got[0], x0, atol=1e-10)
    np.testing.assert_allclose(got[1], eps, atol=1e-10)


@pytest.mark.parametrize(("name", "schedule"), rows(pair for pair in PAIRINGS if allowed(*pair)))
def test_whatever_the_network_says_is_split_into_parts_of_x(name, schedule, x64):
    """alpha x0 + sigma eps = x for any y: a wrong network moves along the line, never off it."""
    prediction, t = build(name, schedule), jnp.linspace(0.01, 1.0, 20)
    x, y = images(1, len(t))
    x0, eps = prediction.split(x, y, t)
    again = over(prediction.schedule.alpha(t)) * x0 + over(prediction.schedule.sigma(t)) * eps
    np.testing.assert_allclose(again, x, atol=1e-9)


@pytest.mark.parametrize(("name", "schedule"), rows(pair for pair in PAIRINGS if allowed(*pair)))
def test_one_time_serves_all_examples(name, schedule):
    prediction = build(name, schedule)
    x, y = (a.astype(jnp.float32) for a in images(2, 3))
    one = prediction.split(x, y, jnp.float32(0.6))
    each = prediction.split(x, y, jnp.full((3,), 0.6))
    np.testing.assert_allclose(one[0], each[0], rtol=1e-6)
    np.testing.assert_allclose(one[1], each[1], rtol=1e-6)


@pytest.mark.parametrize("schedule", schedules.EVERY)
def test_definitions(schedule, x64):
    """eps, x0, score and v = alpha eps - sigma x0 (Salimans & Ho 2022, appendix D), as the papers write them."""
    t = jnp.linspace(0.01, 1.0, 20)
    x0, eps = images(3, len(t))
    of = lambda name: build(name, schedule).target(x0, eps, t)
    alpha, sigma = (over(f(t)) for f in (build("v", schedule).schedule.alpha, build("v", schedule).schedule.sigma))
    np.testing.assert_array_equal(of("eps"), eps)
    np.testing.assert_array_equal(of("x0"), x0)
    np.testing.assert_allclose(of("score"), -eps / sigma, rtol=1e-12)
    np.testing.assert_allclose(of("v"), alpha * eps - sigma * x0, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("schedule", schedules.EVERY)
def test_score_is_the_gradient_of_the_log_density(schedule, x64):
    """Of N(alpha x0, sigma^2), by automatic differentiation of the density (Song et al. 2021, eq. 7)."""
    prediction, t = build("score", schedule), jnp.float64(0.3)
    alpha, sigma = prediction.schedule.alpha(t), prediction.schedule.sigma(t)
    x0, eps = images(6, 1)
    slope = jax.grad(lambda x: jnp.sum(jax.scipy.stats.norm.logpdf(x, alpha * x0, sigma)))(alpha * x0 + sigma * eps)
    np.testing.assert_allclose(prediction.target(x0, eps, t), slope, rtol=1e-7)


@pytest.mark.parametrize("schedule", schedules.EVERY)
def test_velocity_is_the_derivative_of_the_path(schedule, x64):
    prediction, t, h = build("velocity", schedule), (jnp.arange(10.0, 990.0, 20.0) + 0.37) / 1000, 1e-6
    x0, eps = images(4, len(t))  # at times between the steps of discrete schedules, where those have corners
    at = lambda t: over(prediction.schedule.alpha(t)) * x0 + over(prediction.schedule.sigma(t)) * eps
    difference = (at(t + h) - at(t - h)) / (2.0 * h)
    np.testing.assert_allclose(prediction.target(x0, eps, t), difference, rtol=1e-6, atol=1e-6)


def test_velocity_of_rectified_flow_is_noise_less_image(x64):
    """Liu et al. 2022, eq. 1 (time runs from data to noise here)."""
    x0, eps = images(5, 4)
    target = build("velocity", "rectified_flow").target(x0, eps, jnp.float64([0.0, 0.3, 0.9, 1.0]))
    np.testing.assert_allclose(target, eps - x0, rtol=1e-12)


def edm_coefficients(sigma):
    """c_skip, c_out and c_in, read off a prediction: x0 = c_skip x + c_out y."""
    prediction, t = build("edm", "edm"), jnp.float64(sigma / 80.0)
    one, zero = jnp.ones((1, 1, 1, 1)), jnp.zeros((1, 1, 1, 1))
    skip, out = (prediction.split(x, y, t)[0].item() for x, y in ((one, zero), (zero, one)))
    return skip, out, prediction.input_scale(t).item()


def test_published_edm_coefficients(x64):
    """At sigma = sigma_data = 0.5: 0.5, 0.353553 and 1.414214 (Karras et al. 2022, Table 1)."""
    np.testing.assert_allclose(edm_coefficients(0.5), (0.5, 0.353553, 1.414214), atol=5e-7)


@pytest.mark.parametrize("sigma", [0.002, 0.1, 1.0, 10.0, 80.0])
def test_edm_preconditioning_as_printed(sigma, x64):
    data = 0.5
    total = sigma**2 + data**2
    expected = (data**2 / total, sigma * data / np.sqrt(total), 1.0 / np.sqrt(total))
    np.testing.assert_allclose(edm_coefficients(sigma), expected, rtol=1e-9)


@pytest.mark.parametrize("schedule", schedules.EVERY)
def test_edm_target_has_unit_variance_on_any_schedule(schedule, x64):
    """The two requirements of Karras et al. 2022, appendix B.6: the network's input and target have variance 1."""
    data = 0.7
    prediction = plugs.build("prediction", f"edm(sigma_data={data})", PREDICTIONS, schedule=schedules.build(schedule))
    t = jnp.linspace(0.01, 1.0, 20)
    one, zero = jnp.ones((20, 1, 1, 1)), jnp.zeros((20, 1, 1, 1))
    a, b = prediction.target(one, zero, t).ravel(), prediction.target(zero, one, t).ravel()
    alpha, sigma = prediction.schedule.alpha(t), prediction.schedule.sigma(t)
    np.testing.assert_allclose(a**2 * data**2 + b**2, 1.0, rtol=1e-9)
    np.testing.assert_allclose(prediction.input_scale(t) ** 2 * (alpha**2 * data**2 + sigma**2), 1.0, rtol=1e-9)
    # and the target is uncorrelated with the input: nothing is left for the network that c_skip could have said
    np.testing.assert_allclose(a * data**2 * alpha + b * sigma, 0.0, atol=1e-9)


@pytest.mark.parametrize(("name", "schedule"), rows(PAIRINGS))
def test_the_network_sees_inputs_of_order_one(name, schedule, x64):
    """Of data with variance 1 or below the scaled input has at most variance 1 (edm, scaled to sigma_data: 4)."""
    prediction, t = build(name, schedule), jnp.linspace(0.001, 1.0, 100)
    scale = prediction.input_scale(t)
    for variance in (0.1, 0.25, 1.0):
        total = scale**2 * (variance * prediction.schedule.alpha(t) ** 2 + prediction.schedule.sigma(t) ** 2)
        assert np.all(np.asarray(total) <= (max(1.0, variance / 0.5**2) if name == "edm" else 1.0) + 1e-9)
        assert np.all(np.asarray(total) >= 0.09)


def test_gradients_pass_through_a_prediction_in_reverse():
    prediction = build("velocity", "vp_linear")
    x = jnp.ones((2, 2, 2, 1))
    slope = jax.grad(lambda y: jnp.sum(prediction.split(x, y, jnp.float32([0.2, 1.0]))[0]))(x)
    assert np.all(np.isfinite(slope))


@pytest.mark.parametrize("value", [0.0, -0.5])
def test_impossible_sigma_data(value):
    with pytest.raises(UserError, match="sigma_data"):
        build(f"edm(sigma_data={value})", "edm")
