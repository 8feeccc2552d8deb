"""Weightings against the papers' formulas, written again in NumPy on the error that each paper weighs."""

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import plugs
from diffusion_jax.diffusion.prediction import PREDICTIONS, check_pairing
from diffusion_jax.diffusion.schedule import SCHEDULES, first_time
from diffusion_jax.diffusion.weighting import WEIGHTINGS
from diffusion_jax.errors import UserError

PAPERS = {
    "snr": ("eps", lambda alpha, sigma: 1.0),  # Ho et al. 2020, eq. 14: |eps - eps_hat|^2
    "truncated_snr": ("x0", lambda alpha, sigma: np.maximum(alpha**2 / sigma**2, 1.0)),  # Salimans & Ho 2022, eq. 9
    "min_snr": ("x0", lambda alpha, sigma: np.minimum(alpha**2 / sigma**2, 5.0)),  # Hang et al. 2023, section 3.4
    # Karras et al. 2022, Table 1, lambda(sigma) on |D - x0|^2 for x0 + sigma noise
    "edm": ("x0", lambda alpha, sigma: ((sigma / alpha) ** 2 + 0.25) / (sigma / alpha * 0.5) ** 2),
    # Kingma & Gao 2023: sigmoid(-lambda + bias) on |eps - eps_hat|^2
    "sigmoid": ("eps", lambda alpha, sigma: 1.0 / (1.0 + (alpha / sigma) ** 2)),
}
"""name -> (the error that the paper weighs, its weight). `simple` weighs y's, whatever y is."""

OPTIONS = {
    "min_snr(gamma=2.0)": ("x0", lambda alpha, sigma: np.minimum(alpha**2 / sigma**2, 2.0)),
    "edm(sigma_data=1.0)": ("x0", lambda alpha, sigma: ((sigma / alpha) ** 2 + 1.0) / (sigma / alpha) ** 2),
    "sigmoid(bias=-3.0)": ("eps", lambda alpha, sigma: 1.0 / (1.0 + np.exp(3.0) * (alpha / sigma) ** 2)),
}


def _pairings():
    for schedule in SCHEDULES:
        for name in PREDICTIONS:
            bound = plugs.build("schedule", schedule, SCHEDULES)
            prediction = plugs.build("prediction", name, PREDICTIONS, schedule=bound)
            try:
                check_pairing("prediction", prediction, "")
            except UserError:
                continue
            yield pytest.param(prediction, id=f"{name}-{schedule}")


PAIRINGS = list(_pairings())


def test_every_weighting_has_its_paper_here():
    assert set(WEIGHTINGS) - {"simple"} == set(PAPERS)


@pytest.mark.parametrize("text", PAPERS | OPTIONS)
@pytest.mark.parametrize("prediction", PAIRINGS)
def test_weighted_error_is_the_papers(text, prediction, x64):
    """weight(y) |y - y_hat|^2 = the paper's weight times the paper's error, for two images that explain the same x."""
    error, weight = (PAPERS | OPTIONS)[text]
    t = jnp.linspace(0.002, 0.998, 40)
    x0 = np.random.default_rng(0).normal(size=(2, len(t), 1, 1, 1))
    alpha, sigma = np.asarray(prediction.schedule.alpha(t)), np.asarray(prediction.schedule.sigma(t))
    x = alpha * 0.3 + sigma * 0.9
    eps = ((x - alpha * x0[..., 0, 0, 0]) / sigma)[..., None, None, None]
    y, y_hat = (prediction.target(jnp.asarray(x0[i]), jnp.asarray(eps[i]), t) for i in range(2))
    ours = plugs.build("weighting", text, WEIGHTINGS)(prediction, t) * ((y - y_hat) ** 2).ravel()
    of = {"x0": x0, "eps": eps}[error]
    np.testing.assert_allclose(ours, weight(alpha, sigma) * ((of[0] - of[1]) ** 2).ravel(), rtol=1e-7)


@pytest.mark.parametrize("prediction", PAIRINGS)
def test_simple_weighs_every_output_alike(prediction):
    t = jnp.linspace(0.01, 1.0, 10)
    np.testing.assert_array_equal(WEIGHTINGS["simple"]()(prediction, t), np.ones(10))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_edm_weight_on_edm_output_is_one(schedule, x64):
    """lambda c_out^2 = 1: the effective weight is uniform at initialisation (Karras et al. 2022, appendix B.6)."""
    prediction = PREDICTIONS["edm"](schedule=plugs.build("schedule", schedule, SCHEDULES))
    np.testing.assert_allclose(WEIGHTINGS["edm"]()(prediction, jnp.linspace(0.001, 0.999, 50)), 1.0, rtol=1e-6)


def test_published_edm_weight(x64):
    """8 at sigma = sigma_data = 0.5, on x0's error."""
    prediction = PREDICTIONS["x0"](schedule=plugs.build("schedule", "edm", SCHEDULES))
    np.testing.assert_allclose(WEIGHTINGS["edm"]()(prediction, jnp.float64([0.5 / 80.0])), 8.0, rtol=1e-9)


@pytest.mark.parametrize("name", WEIGHTINGS)
@pytest.mark.parametrize("prediction", PAIRINGS)
def test_weights_are_finite_wherever_training_looks(name, prediction):
    """In float32, from the first time to 1 inclusive; rectified flow's SNR is 0 there."""
    t = jnp.concatenate([first_time(prediction.schedule)[None], jnp.linspace(0.01, 1.0, 100)])
    weight = np.asarray(plugs.build("weighting", name, WEIGHTINGS)(prediction, t))
    assert weight.shape == t.shape
    assert np.all(np.isfinite(weight))
    assert np.all(weight >= 0.0)


@pytest.mark.parametrize("text", ["min_snr(gamma=0.0)", "edm(sigma_data=0.0)"])
def test_impossible_options_are_refused_by_name(text):
    with pytest.raises(UserError, match=text.split("(")[0]):
        plugs.build("family.weighting", text, WEIGHTINGS)
