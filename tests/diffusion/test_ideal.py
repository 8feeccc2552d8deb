"""The ideal denoisers against numerical integration and against the score's definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from diffusion_jax.diffusion.ideal import gaussian_flow, mixture
from diffusion_jax.diffusion.schedule import SCHEDULES

MEANS, STDS, WEIGHTS = np.array([-0.7, 0.6]), np.array([0.3, 0.2]), np.array([0.4, 0.6])


def ideal(schedule):
    return mixture(schedule, jnp.asarray(MEANS).reshape(2, 1, 1, 1), jnp.asarray(STDS), jnp.asarray(WEIGHTS))


@pytest.mark.parametrize("name", ["vp_linear", "edm", "rectified_flow"])
@pytest.mark.parametrize("t", [0.05, 0.5, 1.0])
def test_posterior_means_are_bayes_integrals(name, t, x64):
    """E[x0 | x] and E[eps | x] = (x - alpha E[x0 | x]) / sigma, as sums over a fine grid of x0."""
    schedule = SCHEDULES[name]()
    alpha, sigma = (float(c(jnp.float64(t))) for c in (schedule.alpha, schedule.sigma))
    x0 = np.linspace(-3.0, 3.0, 200_001)
    prior = np.sum(WEIGHTS * stats.norm.pdf(x0[:, None], MEANS, STDS), axis=1)
    for x in np.hypot(alpha, sigma) * np.array([-0.8, 0.1, 1.1]):
        joint = prior * stats.norm.pdf(x, alpha * x0, sigma)
        mean = np.sum(x0 * joint) / np.sum(joint)
        d = ideal(schedule)(jnp.full((1, 1, 1, 1), x), jnp.float64(t))
        np.testing.assert_allclose(d.x0.item(), mean, rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(d.eps.item(), (x - alpha * mean) / sigma, rtol=1e-6, atol=1e-7)


def test_images_of_a_finite_data_set(x64):
    """Points (std 0) of 2x2 pixels: a softmax over the squared distances, each image by its own."""
    schedule = SCHEDULES["edm"]()
    points = jax.random.normal(jax.random.key(0), (5, 2, 2, 1))
    denoise = mixture(schedule, points, jnp.zeros(5), jnp.full(5, 0.2))
    x, t = points[1:4] + 0.05, jnp.array([0.001, 0.01, 0.1])
    d = denoise(x, t)
    for i in range(3):
        distance = np.sum((np.asarray(x[i]) - np.asarray(points)) ** 2, axis=(1, 2, 3))
        r = np.exp(-0.5 * distance / (80 * t[i].item()) ** 2)
        np.testing.assert_allclose(d.x0[i], np.tensordot(r / r.sum(), np.asarray(points), 1), rtol=1e-9)
    np.testing.assert_allclose(d.x0[0], points[1], atol=0.3)


def test_the_flow_of_a_gaussian_keeps_quantiles(x64):
    schedule = SCHEDULES["vp_linear"]()
    t, s = jnp.float64(0.9), jnp.float64(0.2)
    x = jnp.linspace(-2.0, 2.0, 7)
    std = lambda u: float(jnp.hypot(0.5 * schedule.alpha(u), schedule.sigma(u)))
    before = stats.norm.cdf(x, 0.4 * float(schedule.alpha(t)), std(t))
    after = stats.norm.cdf(gaussian_flow(schedule, x, t, s, 0.4, 0.5), 0.4 * float(schedule.alpha(s)), std(s))
    np.testing.assert_allclose(after, before, rtol=1e-9)
