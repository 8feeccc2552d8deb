"""Schedules against closed forms, published values and finite differences."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad

from diffusion_jax import plugs
from diffusion_jax.diffusion.schedule import SCHEDULES, first_time, logsnr, with_derivatives
from diffusion_jax.errors import UserError

VARIANCE_PRESERVING = ("vp_linear", "cosine")


def vp_linear(t):
    """alpha = exp(-1/2 integral of beta), beta(t) = 0.1 + 19.9 t (Song et al. 2021, eq. 32-33), by quadrature."""
    alpha = np.exp(-0.5 * quad(lambda u: 0.1 + (20.0 - 0.1) * u, 0.0, t)[0])
    return alpha, np.sqrt(1.0 - alpha**2)


def cosine(t):
    """An angle that grows linearly up to where the log-SNR is -20 (Nichol & Dhariwal 2021, eq. 17)."""
    end = np.pi / 2 - np.arctan(np.exp(-10.0))
    return np.sqrt(1.0 - np.sin(end * t) ** 2), np.sin(end * t)


CLOSED_FORMS = {
    "vp_linear": vp_linear,
    "cosine": cosine,
    "edm": lambda t: (1.0, 80.0 * t),  # Karras et al. 2022, Table 1
    "rectified_flow": lambda t: (1.0 - t, t),  # Liu et al. 2022, eq. 1
}


@pytest.fixture(params=SCHEDULES)
def schedule(request):
    return plugs.build("schedule", request.param, SCHEDULES)


def test_data_at_the_start(schedule):
    assert float(schedule.alpha(jnp.float32(0.0))) == 1.0
    assert float(schedule.sigma(jnp.float32(0.0))) == 0.0


def test_signal_falls_and_noise_prevails_at_the_end(schedule, x64):
    ratio = np.asarray(logsnr(schedule, jnp.linspace(0.0, 1.0, 501)))
    assert ratio[0] == np.inf
    assert np.all(np.diff(ratio[1:]) < 0.0)
    assert ratio[-1] < -2.0 * np.log(
        50.0
    )  # sampling starts from pure noise: what is left of the data must be next to 0


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_closed_form(name, x64):
    schedule = plugs.build("schedule", name, SCHEDULES)
    for t in (0.0, 1e-3, 0.1, 0.37, 0.5, 0.9, 1.0):
        got = schedule.alpha(jnp.float64(t)), schedule.sigma(jnp.float64(t))
        np.testing.assert_allclose(got, CLOSED_FORMS[name](t), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", VARIANCE_PRESERVING)
def test_variance_is_preserved(name, x64):
    schedule, t = plugs.build("schedule", name, SCHEDULES), jnp.linspace(0.0, 1.0, 101)
    np.testing.assert_allclose(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, 1.0, rtol=1e-12)


def test_published_end_of_the_vp_schedule():
    """Karras et al. 2022 give sigma_max = 152 for Song's VP (their appendix C.1: 152.167 = sqrt(exp(10.05) - 1))."""
    schedule = plugs.build("schedule", "vp_linear", SCHEDULES)
    np.testing.assert_allclose(schedule.sigma(jnp.float32(1.0)) / schedule.alpha(jnp.float32(1.0)), 152.167, rtol=1e-5)


def test_published_noise_label_of_edm():
    """c_noise = ln(sigma) / 4 (Karras et al. 2022, Table 1)."""
    schedule = plugs.build("schedule", "edm", SCHEDULES)
    label = schedule.label(jnp.float32([0.002, 0.5, 1.0, 80.0]) / 80.0)
    np.testing.assert_allclose(label, np.log([0.002, 0.5, 1.0, 80.0]) / 4.0, atol=1e-6)


def test_time_inverts_logsnr(schedule, x64):
    t = jnp.concatenate([jnp.float64([0.0, 1e-6, 1e-4]), jnp.linspace(0.001, 1.0, 200)])
    np.testing.assert_allclose(schedule.time(logsnr(schedule, t)), t, rtol=1e-8, atol=1e-14)


def test_time_inverts_logsnr_in_float32(schedule):
    t = jnp.linspace(0.001, 0.99, 200)
    np.testing.assert_allclose(schedule.time(logsnr(schedule, t)), t, rtol=2e-5)


def test_first_time_is_where_the_noise_is_a_thousandth(schedule, x64):
    t = first_time(schedule).astype(jnp.float64)
    np.testing.assert_allclose(schedule.sigma(t) / schedule.alpha(t), 1e-3, rtol=1e-5)


def test_derivatives_are_the_slopes_of_the_curves(schedule, x64):
    t, h = jnp.linspace(0.01, 0.99, 50), 1e-5
    alpha, sigma, d_alpha, d_sigma = with_derivatives(schedule, t)
    np.testing.assert_array_equal(alpha, schedule.alpha(t))
    np.testing.assert_array_equal(sigma, schedule.sigma(t))
    for curve, slope in ((schedule.alpha, d_alpha), (schedule.sigma, d_sigma)):
        np.testing.assert_allclose(slope, (curve(t + h) - curve(t - h)) / (2.0 * h), rtol=1e-6, atol=1e-8)


def test_label_tells_times_apart(schedule):
    label = np.asarray(schedule.label(jnp.linspace(float(first_time(schedule)), 1.0, 200)))
    assert np.all(np.isfinite(label))
    assert np.all(np.diff(label) > 0.0)
    assert np.abs(label).max() < 3.0  # "of order 1": ln(80) / 4 is 1.1, and the first time's -1.7


def test_methods_are_elementwise(schedule):
    t = jnp.linspace(0.1, 0.9, 6)
    for method in (schedule.alpha, schedule.sigma, schedule.label, lambda t: schedule.time(logsnr(schedule, t))):
        whole = np.asarray(method(t.reshape(2, 3))).reshape(-1)
        np.testing.assert_allclose(whole, [float(method(each)) for each in t], rtol=1e-6)


@pytest.mark.parametrize(
    "text",
    [
        "vp_linear(beta_min=0.0)",
        "vp_linear(beta_min=20.0,beta_max=0.1)",
        "cosine(logsnr_min=1.0)",
        "edm(sigma_max=-1.0)",
    ],
)
def test_impossible_options_are_refused_by_name(text):
    with pytest.raises(UserError, match=text.split("(")[0]):
        plugs.build("family.schedule", text, SCHEDULES)
