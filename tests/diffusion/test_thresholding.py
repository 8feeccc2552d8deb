"""Thresholds: the papers' statements in NumPy, and that eps is derived again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import plugs
from diffusion_jax.diffusion.guidance import guide, with_and_without_label
from diffusion_jax.diffusion.schedule import SCHEDULES
from diffusion_jax.diffusion.solvers import SOLVERS
from diffusion_jax.diffusion.solvers.base import solve
from diffusion_jax.diffusion.thresholding import THRESHOLDS, Static, thresholded
from diffusion_jax.errors import UserError
from diffusion_jax.types import Denoised
from tests.diffusion.guided import NULL, of, two_gaussians

NAMES = ("vp_linear", "cosine", "edm", "rectified_flow")
TEXTS = ("none", "static(bound=0.7)", "dynamic(quantile=0.9)")


def threshold_of(text):
    return plugs.build("sample.threshold", text, THRESHOLDS)


@pytest.fixture(params=NAMES)
def schedule(request):
    return plugs.build("schedule", request.param, SCHEDULES)


def test_every_threshold_is_tested():
    assert {plugs.parse("", text)[0] for text in TEXTS} == set(THRESHOLDS)


def test_values_as_the_papers_write_them(x64):
    """Saharia et al. 2022, section 2.3, in NumPy, whose percentile interpolates linearly; each image has its own s."""
    x0 = np.random.default_rng(0).normal(size=(4, 5, 6, 3)) * np.array([0.1, 0.6, 1.0, 5.0]).reshape(4, 1, 1, 1)
    np.testing.assert_array_equal(threshold_of("none")(jnp.asarray(x0)), x0)
    np.testing.assert_array_equal(threshold_of("static(bound=0.7)")(jnp.asarray(x0)), np.clip(x0, -0.7, 0.7))
    for share in (0.9, 0.995, 1.0):
        s = np.array([max(np.percentile(np.abs(image), 100 * share), 1.0) for image in x0]).reshape(4, 1, 1, 1)
        assert s[0] == 1.0 < s[2] < s[3]
        got = np.asarray(threshold_of(f"dynamic(quantile={share})")(jnp.asarray(x0)))
        np.testing.assert_allclose(got, np.clip(x0, -s, s) / s, rtol=1e-12)
        assert np.abs(got).max() <= 1.0
        np.testing.assert_array_equal(got[0], x0[0])  # an image within [-1, 1] stays as it is


@pytest.mark.parametrize("text", ["static(bound=0.1)", *TEXTS])
def test_both_parts_still_make_x(text, schedule, x64):
    """alpha x0 + sigma eps is x: what x0 loses, eps gains."""
    free, changed = of(schedule, 0.0, 2.0), 0
    denoise = thresholded(free, schedule, threshold_of(text))
    for t in (1e-3, 0.3, 0.7, 1.0):
        t = jnp.float64(t)
        x = 3.0 * jnp.hypot(schedule.alpha(t), schedule.sigma(t)) * jax.random.normal(jax.random.key(3), (4, 3, 3, 1))
        x0, eps, _ = denoise(x, t)
        np.testing.assert_allclose(schedule.alpha(t) * x0 + schedule.sigma(t) * eps, x, rtol=1e-9, atol=1e-9)
        changed += int(np.sum(np.asarray(x0) != np.asarray(free(x, t).x0)))
    assert changed > 10 or text == "none"


@pytest.mark.parametrize("text", ["none", "static", "dynamic(quantile=1.0)"])
def test_what_is_within_stays_to_the_bit(text, schedule):
    small = lambda x, t: Denoised(0.2 * x, 0.3 * x, spread=x)
    x = jax.random.normal(jax.random.key(3), (4, 3, 3, 1))
    for t in (1e-3, 0.5, 1.0):
        got = thresholded(small, schedule, threshold_of(text))(x, jnp.float32(t))
        np.testing.assert_array_equal(jnp.stack(got), jnp.stack(small(x, t)))


def test_one_time_an_example(schedule):
    x = 5.0 * jax.random.normal(jax.random.key(3), (3, 2, 2, 1))
    t = jnp.float32([0.2, 0.6, 1.0])
    denoise = thresholded(lambda x, t: Denoised(2.0 * x, jnp.zeros_like(x)), schedule, threshold_of("dynamic"))
    whole = np.asarray(denoise(x, t)[:2])
    for i in range(3):
        alone = denoise(x[i : i + 1], t[i])[:2]
        np.testing.assert_allclose(alone, whole[:, i : i + 1], rtol=1e-6)


def test_eps_that_is_not_derived_again_leads_elsewhere(x64):
    """The most common peer clips x0 and steps on with the eps that belonged to the unclipped one.

    DDIM on data N(0, 2^2), whose x0 = 4 alpha x / (4 alpha^2 + sigma^2) is clipped at 1, from x = alpha + 4 sigma. On
    this line x0 is above 1 wherever sigma < 16 alpha, and the clipped x0 = 1 leaves eps = 4: the walk stays on it.
    """
    schedule = SCHEDULES["vp_linear"]()
    free, times = of(schedule, 0.0, 2.0), jnp.linspace(0.5, 0.0, 11)
    keys = jax.random.split(jax.random.key(0), 1)
    line = schedule.alpha(times) + 4.0 * schedule.sigma(times)

    def stale(x, t):
        d = free(x, t)
        return d._replace(x0=jnp.clip(d.x0, -1.0, 1.0))

    def walk(denoise, steps):
        start = line[0].reshape(1, 1, 1, 1)
        return float(solve(denoise, schedule, SOLVERS["ddim"](), times, jnp.int32(steps), start, keys)[0, 0, 0, 0])

    for steps in (5, 8, 10):
        np.testing.assert_allclose(walk(thresholded(free, schedule, Static()), steps), line[steps], rtol=1e-9)
    assert line[5] - walk(stale, 5) > 0.5


@pytest.mark.parametrize("text", TEXTS)
def test_options_are_traced(text):
    schedule, traces = SCHEDULES["cosine"](), []

    @jax.jit
    def run(threshold, x):
        traces.append(1)
        return thresholded(of(schedule, 0.0, 2.0), schedule, threshold)(x, jnp.float32(0.3)).x0

    threshold, x = threshold_of(text), 3.0 * jax.random.normal(jax.random.key(3), (2, 3, 3, 1))
    results = [run(jax.tree.map(lambda leaf, by=by: by * leaf, threshold), x) for by in (1.0, 0.8)]
    assert len(traces) == 1
    assert np.allclose(*results) == (text == "none")


@pytest.mark.parametrize("text", TEXTS)
def test_guided_and_thresholded_is_finite_from_end_to_end(text, schedule):
    pair = with_and_without_label(two_gaussians(schedule), jnp.int32([0, 1]), NULL)
    run = jax.jit(thresholded(guide(pair, schedule, jnp.float32(8.0)), schedule, threshold_of(text)))
    x = 2.0 * schedule.sigma(jnp.float32(1.0)) * jax.random.normal(jax.random.key(3), (2, 2, 2, 1))
    for t in (1.0, 0.999, 0.5, 1e-2, 1e-4, 1e-6):
        assert np.all(np.isfinite(np.asarray(run(x, jnp.float32(t))[:2])))


@pytest.mark.parametrize("text", ["static(bound=0.0)", "dynamic(quantile=0.0)", "dynamic(quantile=1.1)"])
def test_impossible_thresholds(text):
    with pytest.raises(UserError, match=r"sample.threshold.*(bound|quantile) must"):
        threshold_of(text)
