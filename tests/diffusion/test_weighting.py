"""Weightings against the papers' formulas, written again in NumPy on the error that each paper weighs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import plugs
from diffusion_jax.diffusion.prediction import PREDICTIONS, check_pairing
from diffusion_jax.diffusion.schedule import first_time, logsnr
from diffusion_jax.diffusion.time_sampling import TIME_SAMPLINGS
from diffusion_jax.diffusion.weighting import WEIGHTINGS
from diffusion_jax.errors import UserError
from tests import schedules

PAPERS = {
    "snr": ("eps", lambda alpha, sigma: 1.0),  # Ho et al. 2020, eq. 14: |eps - eps_hat|^2
    "truncated_snr": ("x0", lambda alpha, sigma: np.maximum(alpha**2 / sigma**2, 1.0)),  # Salimans & Ho 2022, eq. 9
    "min_snr": ("x0", lambda alpha, sigma: np.minimum(alpha**2 / sigma**2, 5.0)),  # Hang et al. 2023, section 3.4
    # Karras et al. 2022, Table 1, lambda(sigma) on |D - x0|^2 for x0 + sigma noise
    "edm": ("x0", lambda alpha, sigma: ((sigma / alpha) ** 2 + 0.25) / (sigma / alpha * 0.5) ** 2),
}
"""name -> (the error that the paper weighs, its weight). `simple` weighs y's, whatever y is."""

INTEGRALS = {
    "elbo": lambda logsnr: np.ones_like(logsnr),  # Kingma et al. 2021, eq. 17-18
    "sigmoid": lambda logsnr: 1.0 / (1.0 + np.exp(logsnr)),  # Kingma & Gao 2023, section 4.2
    "sigmoid(bias=-3.0)": lambda logsnr: 1.0 / (1.0 + np.exp(logsnr + 3.0)),
}
"""name -> w(logsnr) in 1/2 int w |eps - eps_hat|^2 dlogsnr."""

OPTIONS = {
    "min_snr(gamma=2.0)": ("x0", lambda alpha, sigma: np.minimum(alpha**2 / sigma**2, 2.0)),
    "edm(sigma_data=1.0)": ("x0", lambda alpha, sigma: ((sigma / alpha) ** 2 + 1.0) / (sigma / alpha) ** 2),
}


def _pairings():
    for schedule in schedules.EVERY:
        for name in PREDICTIONS:
            bound = schedules.build(schedule)
            prediction = plugs.build("prediction", name, PREDICTIONS, schedule=bound)
            try:
                check_pairing("prediction", prediction, "")
            except UserError:
                continue
            yield pytest.param(prediction, id=f"{name}-{schedule}", marks=schedules.marks(name, schedule))


PAIRINGS = list(_pairings())


def test_every_weighting_has_its_paper_here():
    assert set(WEIGHTINGS) - {"simple"} == set(PAPERS) | {text.split("(")[0] for text in INTEGRALS}


@pytest.mark.parametrize("prediction", PAIRINGS)
def test_weighted_error_is_the_papers(prediction, x64):
    """weight(y) |y - y_hat|^2 = the paper's weight times the paper's error, for two images that explain the same x."""
    t = jnp.linspace(0.002, 0.998, 40)
    x0 = np.random.default_rng(0).normal(size=(2, len(t), 1, 1, 1))
    alpha, sigma = np.asarray(prediction.schedule.alpha(t)), np.asarray(prediction.schedule.sigma(t))
    eps, squared = explained(prediction, t, x0)
    for text, (error, weight) in (PAPERS | OPTIONS).items():
        ours = plugs.build("weighting", text, WEIGHTINGS)(prediction, t, 3.0 * jnp.ones_like(t)) * squared
        of = {"x0": x0, "eps": eps}[error]
        np.testing.assert_allclose(ours, weight(alpha, sigma) * ((of[0] - of[1]) ** 2).ravel(), rtol=1e-7, err_msg=text)


def explained(prediction, t, x0):
    """The eps that makes of each of two x0 the same x, and the squared difference of their y."""
    alpha, sigma = np.asarray(prediction.schedule.alpha(t)), np.asarray(prediction.schedule.sigma(t))
    x = alpha * 0.3 + sigma * 0.9
    eps = ((x - alpha * x0[..., 0, 0, 0]) / sigma)[..., None, None, None]
    y, y_hat = (prediction.target(jnp.asarray(x0[i]), jnp.asarray(eps[i]), t) for i in range(2))
    return eps, np.asarray((y - y_hat) ** 2).ravel()


@pytest.mark.parametrize("prediction", PAIRINGS)
def test_integrals_count_a_step_of_logsnr_alike(prediction, x64):
    """-w(logsnr) / 2 dlogsnr/dt dt/du |eps - eps_hat|^2, the slope of log-SNR by finite differences."""
    t, h = (jnp.arange(10.0, 990.0, 20.0) + 0.37) / 1000, 1e-6  # not at the corners of discrete schedules
    x0 = np.random.default_rng(0).normal(size=(2, len(t), 1, 1, 1))
    eps, squared = explained(prediction, t, x0)
    at = lambda t: np.asarray(logsnr(prediction.schedule, t))
    here, slope = at(t), (at(t + h) - at(t - h)) / (2 * h)
    for text, weight in INTEGRALS.items():
        expected = -weight(here) / 2 * slope * 3.0 * ((eps[0] - eps[1]) ** 2).ravel()
        ours = plugs.build("weighting", text, WEIGHTINGS)(prediction, t, 3.0 * jnp.ones_like(t)) * squared
        np.testing.assert_allclose(ours, expected, rtol=1e-6, err_msg=text)


SOME = [("eps", "vp_linear"), ("velocity", "rectified_flow"), ("edm", "ve"), ("x0", "scaled_linear")]
SAMPLINGS = ("uniform", "logit_normal(mean=0.5)", "log_normal(std=2.0)")


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize(("name", "schedule"), SOME)
def test_elbo_is_the_diffusion_term_of_the_bound(name, schedule, sampling, x64):
    """Of N(0, s^2) in nats a dimension, whatever the times: 1/2 int SNR s^2 / (1 + SNR s^2) dlogsnr
    = 1/2 ln((1 + SNR_first s^2) / (1 + SNR_last s^2)), the floor of eps being alpha^2 s^2 / (alpha^2 s^2 + sigma^2).

    The mean over u by the trapezoid rule, on u that lie densely in the tails.
    """
    s, bound = 0.6, schedules.build(schedule)
    prediction = plugs.build("prediction", name, PREDICTIONS, schedule=bound)
    sample = plugs.build("time", sampling, TIME_SAMPLINGS)
    u = jax.scipy.stats.norm.cdf(jnp.linspace(-5.19, 5.19, 40001))
    t, slope = jax.jvp(lambda u: sample(bound, u), (u,), (jnp.ones_like(u),))
    alpha, sigma = bound.alpha(t), bound.sigma(t)
    x0, eps = (part.reshape(-1, 1, 1, 1) for part in (sigma, -alpha))  # two images that explain the same x
    floor = (prediction.target(x0, eps, t) ** 2).ravel() * s**2 / (alpha**2 * s**2 + sigma**2)
    integral = np.trapezoid(np.asarray(WEIGHTINGS["elbo"]()(prediction, t, slope) * floor), np.asarray(u))
    first, last = np.exp(np.asarray(logsnr(bound, t))[[0, -1]])
    assert (first > 0.9e6) == (not sampling.startswith("logit"))  # a logit-normal's tail ends before the first time
    np.testing.assert_allclose(integral, 0.5 * np.log((1.0 + first * s**2) / (1.0 + last * s**2)), rtol=2e-3)


@pytest.mark.parametrize(("name", "schedule"), SOME)
def test_sigmoid_of_a_large_bias_is_the_bound(name, schedule, x64):
    prediction = PREDICTIONS[name](schedule=schedules.build(schedule))
    t = jnp.linspace(0.1, 1.0, 10)
    large, bound = (plugs.build("w", text, WEIGHTINGS) for text in ("sigmoid(bias=60.0)", "elbo"))
    np.testing.assert_allclose(large(prediction, t, t), bound(prediction, t, t), rtol=1e-12)


@pytest.mark.parametrize("prediction", PAIRINGS)
def test_simple_weighs_every_output_alike(prediction):
    t = jnp.linspace(0.01, 1.0, 10)
    np.testing.assert_array_equal(WEIGHTINGS["simple"]()(prediction, t, 3.0 * jnp.ones_like(t)), np.ones(10))


@pytest.mark.parametrize("schedule", schedules.EVERY)
def test_edm_weight_on_edm_output_is_one(schedule, x64):
    """lambda c_out^2 = 1: the effective weight is uniform at initialisation (Karras et al. 2022, appendix B.6)."""
    prediction = PREDICTIONS["edm"](schedule=schedules.build(schedule))
    t = jnp.linspace(0.001, 0.999, 50)
    np.testing.assert_allclose(WEIGHTINGS["edm"]()(prediction, t, jnp.ones_like(t)), 1.0, rtol=1e-6)


def test_published_edm_weight(x64):
    """8 at sigma = sigma_data = 0.5, on x0's error."""
    prediction = PREDICTIONS["x0"](schedule=schedules.build("edm"))
    t = jnp.float64([0.5 / 80.0])
    np.testing.assert_allclose(WEIGHTINGS["edm"]()(prediction, t, jnp.ones_like(t)), 8.0, rtol=1e-9)


@pytest.mark.parametrize("prediction", PAIRINGS)
def test_weights_are_finite_wherever_training_looks(prediction):
    """In float32, from the first time to 1 inclusive; rectified flow's SNR is 0 there."""
    t = jnp.concatenate([first_time(prediction.schedule)[None], jnp.linspace(0.01, 1.0, 100)])
    for name in WEIGHTINGS:
        weight = np.asarray(plugs.build("weighting", name, WEIGHTINGS)(prediction, t, jnp.ones_like(t)))
        assert weight.shape == t.shape
        assert np.all(np.isfinite(weight)), name
        assert np.all(weight >= 0.0), name


@pytest.mark.parametrize("text", ["min_snr(gamma=0.0)", "edm(sigma_data=0.0)"])
def test_impossible_options_are_refused_by_name(text):
    with pytest.raises(UserError, match=text.split("(")[0]):
        plugs.build("family.weighting", text, WEIGHTINGS)
