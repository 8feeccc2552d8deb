"""Likelihoods against densities known in closed form.

The model that is measured is x at `first_time` over alpha: the data with noise of standard deviation r = sigma / alpha
= 1/1000 on it. Its other end is N(0, sigma(1)^2), not the data's own distribution there.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from scipy.special import logsumexp

from diffusion_jax import plugs, rng
from diffusion_jax.diffusion import likelihood
from diffusion_jax.diffusion.broadcast import over
from diffusion_jax.diffusion.likelihood import LIKELIHOODS
from diffusion_jax.diffusion.schedule import SCHEDULES, first_time
from diffusion_jax.diffusion.straight import Straight
from diffusion_jax.errors import UserError
from diffusion_jax.types import Denoised

USUAL = {"cosine", "edm", "rectified_flow"}
"""One schedule of each kind: the others with -m slow."""

NAMES = ("vp_linear", "edm", "rectified_flow")
MEAN = np.array([0.3, -0.2, 0.1, 0.5])
EIGENVALUES = np.array([0.02, 0.1, 0.3, 0.5])
ROTATION = np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))[0]
COVARIANCE = (ROTATION * EIGENVALUES) @ ROTATION.T
UNIFORM_DIGITS = 4.0875
"""Bits per dimension of 17 levels drawn alike: log2(17), a figure without a model."""


pytestmark = pytest.mark.usefixtures("quick_compilation")


def build(name):
    return plugs.build("schedule", name, SCHEDULES)


def correlated(schedule, variances=EIGENVALUES, rotation=ROTATION):
    """The ideal denoiser of 2x2 images N(MEAN, COVARIANCE): in the coordinates of its axes they are independent."""

    def denoise(x, t):
        alpha, sigma = (jnp.broadcast_to(c, x.shape[:1])[:, None] for c in (schedule.alpha(t), schedule.sigma(t)))
        q, mean, variance = (jnp.asarray(a, x.dtype) for a in (rotation, MEAN[None], variances[None]))
        off = (x.reshape(-1, 4) - alpha * mean) @ q / (alpha**2 * variance + sigma**2)
        x0, eps = mean + (alpha * variance * off) @ q.T, (sigma * off) @ q.T
        return Denoised(x0.reshape(x.shape), eps.reshape(x.shape))

    return denoise


def pixels(schedule, means, stds, shares):
    """The ideal denoiser of images whose pixels are drawn from one mixture each; stds 0 for points."""

    def denoise(x, t):
        m, s, p = (jnp.asarray(a, x.dtype).reshape(1, 1, 1, 1, -1) for a in (means, stds, shares))
        alpha, sigma = (over(c, x[..., None]) for c in (schedule.alpha(t), schedule.sigma(t)))
        variance = alpha**2 * s**2 + sigma**2
        off = x[..., None] - alpha * m
        share = jax.nn.softmax(jnp.log(p) - 0.5 * jnp.log(variance) - 0.5 * off**2 / variance, axis=-1)
        x0 = jnp.sum(share * (m + alpha * s**2 / variance * off), axis=-1)
        return Denoised(x0, jnp.sum(share * sigma / variance * off, axis=-1))

    return denoise


def keys(count, seed=0):
    return rng.example_keys(jax.random.key(seed), jnp.arange(count))


def images(count, seed=0):
    """Draws of the correlated images."""
    drawn = np.random.default_rng(seed).multivariate_normal(MEAN, COVARIANCE, count)
    return jnp.asarray(drawn.reshape(-1, 2, 2, 1))


def slope(counts, errors):
    return -np.polyfit(np.log(counts), np.log(errors), 1)[0]


# ------------------------------------------------------------------------------------------ the flow


@functools.cache
def density(name, make=correlated):
    """(x0, steps) -> log densities with the exact trace, compiled once; and the number of times it was traced."""
    schedule, traces = build(name), []

    @jax.jit
    def program(x0, steps):
        traces.append(1)
        return likelihood.flow_log_density(make(schedule), schedule, x0, likelihood.basis(x0), steps)

    return (lambda x0, steps: np.asarray(program(x0, jnp.int32(steps)))), traces


def ends(name):
    """(alpha, sigma) at first_time and at 1, as NumPy float64."""
    schedule = build(name)
    times = (first_time(schedule).astype(float), jnp.ones(()))
    return [(float(schedule.alpha(t)), float(schedule.sigma(t))) for t in times]


def exact(name, x0):
    """The Gaussian flow stretches each axis by the ratio of standard deviations, from alpha x0 to N(0, sigma(1)^2)."""
    (alpha, sigma), (alpha_1, sigma_1) = ends(name)
    off = (np.asarray(x0).reshape(-1, 4) - MEAN) @ ROTATION
    stretch = np.sqrt((alpha_1**2 * EIGENVALUES + sigma_1**2) / (alpha**2 * EIGENVALUES + sigma**2))
    x1 = alpha_1 * MEAN @ ROTATION + alpha * off * stretch
    return np.sum(stats.norm.logpdf(x1, 0.0, sigma_1) + np.log(stretch * alpha), axis=-1)


@pytest.mark.parametrize("name", NAMES)
def test_flow_of_any_gaussian(name, x64):
    """Order 4 (the classical Runge-Kutta method's) towards the exact stretching; any number of steps, one trace."""
    x0, counts = images(8), (32, 64, 128, 256)
    program, traces = density(name)
    errors = [np.abs(program(x0, n) - exact(name, x0)).mean() for n in counts]
    assert len(traces) == 1
    assert abs(slope(counts, errors) - 4.0) < 0.4, errors
    assert errors[0] < 0.05
    assert errors[-1] < 1e-5


@pytest.mark.parametrize(("name", "atol"), [("vp_linear", 0.02), ("edm", 0.03), ("rectified_flow", 1e-6)])
def test_flow_density_is_that_of_the_data(name, atol, x64):
    """N(mean, covariance + r^2), but for alpha(1) x0, neglected at the end where it is not 0."""
    x0 = images(8)
    truth = stats.multivariate_normal.logpdf(np.asarray(x0).reshape(-1, 4), MEAN, COVARIANCE + 1e-6 * np.eye(4))
    np.testing.assert_allclose(density(name)[0](x0, 256), truth, atol=atol)


def two_modes(schedule):
    return pixels(schedule, (-0.7, 0.6), (0.3, 0.2), (0.4, 0.6))


def test_flow_of_a_mixture(x64):
    """On rectified flow, whose end is the noise exactly: order 4 towards the mixture's density."""
    x0, counts = jnp.linspace(-1.2, 1.2, 9).reshape(-1, 1, 1, 1), (16, 32, 64, 128)
    value = np.asarray(x0).ravel()
    parts = [p * stats.norm.pdf(value, m, np.hypot(s, 1e-3)) for m, s, p in ((-0.7, 0.3, 0.4), (0.6, 0.2, 0.6))]
    errors = [np.abs(density("rectified_flow", two_modes)[0](x0, n) - np.log(sum(parts))).max() for n in counts]
    assert abs(slope(counts, errors) - 4.0) < 0.4, errors
    assert errors[-1] < 1e-5


def test_trace_by_random_probes(x64):
    """Unbiased: the mean over 2,000 probes is the exact trace's within 4 standard errors. 8 a key: an 8th of the
    variance, within 5 of that ratio's standard errors."""
    schedule, count = build("rectified_flow"), 2000
    x0 = jnp.broadcast_to(images(1), (count, 2, 2, 1))
    estimate = jax.jit(
        lambda probes: likelihood.flow_log_density(correlated(schedule), schedule, x0, probes, jnp.int32(16))
    )
    exactly = density("rectified_flow")[0](images(1), 16)
    one, eight = (np.asarray(estimate(likelihood.rademacher(keys(count), n, x0))) for n in (1, 8))
    np.testing.assert_allclose(one.mean(), exactly[0], atol=4 * one.std() / np.sqrt(count))
    np.testing.assert_allclose(eight.mean(), exactly[0], atol=4 * eight.std() / np.sqrt(count))
    np.testing.assert_allclose(one.var() / eight.var(), 8.0, rtol=5 * 2 / np.sqrt(count))
    assert one.std() > 0.1


def test_random_signs_are_exact_where_pixels_are_independent(x64):
    """The Jacobian is diagonal, and v_i^2 = 1."""
    schedule, x0 = build("vp_linear"), images(4)
    denoise = correlated(schedule, rotation=np.eye(4))
    run = jax.jit(lambda probes: likelihood.flow_log_density(denoise, schedule, x0, probes, jnp.int32(8)))
    np.testing.assert_allclose(run(likelihood.rademacher(keys(4), 1, x0)), run(likelihood.basis(x0)), rtol=1e-10)


def test_probes_have_the_identity_as_their_second_moment(x64):
    x = jnp.zeros((2, 2, 2, 1))
    for probes, atol in ((likelihood.basis(x), 1e-12), (likelihood.rademacher(keys(2), 4096, x), 5 / 64)):
        v = np.asarray(probes)[:, 1].reshape(-1, 4)
        np.testing.assert_allclose(v.T @ v / len(v), np.eye(4), atol=atol)


# ------------------------------------------------------------------------------------------ discrete images


def test_the_straight_frame_begins_and_ends_at_scale_one(x64):
    """So no log-determinant is left of the frame itself at t = 1, and only log(alpha / c) at first_time."""
    for name in SCHEDULES:
        np.testing.assert_allclose(Straight(build(name)).scale(jnp.array([0.0, 1.0])), 1.0, atol=1e-6)


def flat(schedule):
    """The ideal denoiser of pixels that are uniform on the 17 cells together: a truncated normal's mean; alpha = 1."""

    def denoise(x, t):
        sigma = schedule.sigma(t)
        low, high = ((edge - x) / sigma for edge in (-17 / 16, 17 / 16))
        pdf, cdf = jax.scipy.stats.norm.pdf, jax.scipy.stats.norm.cdf
        eps = (pdf(high) - pdf(low)) / (cdf(high) - cdf(low))
        return Denoised(x - sigma * eps, eps)

    return denoise


def levels_alike(count):
    return np.random.default_rng(1).integers(17, size=(count, 4, 4, 1)) / 8.0 - 1.0


def test_flow_of_levels_drawn_alike(x64):
    """A density that is flat over all cells gives every image log2(17) bits a pixel, whatever it shows.

    The noise of 1/1000 blurs the outer edges: 0.01 is left for that.
    """
    schedule, x0 = build("edm"), jnp.asarray(levels_alike(16))
    flow = plugs.build("likelihood", "flow(steps=64)", LIKELIHOODS)
    bits = np.asarray(jax.jit(lambda x0, keys: flow(flat(schedule), schedule, x0, keys, 17))(x0, keys(16)))
    np.testing.assert_allclose(bits.mean(), UNIFORM_DIGITS, atol=0.01)
    assert bits.std() < 0.05


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in USUAL else pytest.mark.slow) for n in SCHEDULES])
def test_flow_on_every_schedule(name):
    """Pixels N(0.2, 0.2^2) on 256 levels, in float32: the entropy log2(0.2 sqrt(2 pi e) 255 / 2), and nothing NaN.

    The spread of -log2 p over the pixels is 1 / (sqrt(2) ln 2) = 1.02: over 1,024 of them 4 standard errors are 0.13.
    """
    schedule = build(name)
    levels = np.rint((np.random.default_rng(0).normal(0.2, 0.2, (16, 8, 8, 1)) + 1) / 2 * 255)
    x0 = jnp.asarray(levels * 2 / 255 - 1, jnp.float32)
    denoise, flow = pixels(schedule, (0.2,), (0.2,), (1.0,)), LIKELIHOODS["flow"]()
    bits = np.asarray(jax.jit(lambda x0, keys: flow(denoise, schedule, x0, keys, 256))(x0, keys(16)))
    assert bits.shape == (16,)
    assert bits.dtype == np.float32
    np.testing.assert_allclose(bits.mean(), np.log2(0.2 * np.sqrt(2 * np.pi * np.e) * 255 / 2), atol=0.13)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in USUAL else pytest.mark.slow) for n in SCHEDULES])
def test_bound_of_levels_drawn_alike(name):
    """The bound is tight for the ideal denoiser of 17 points, in float32: log2(17) bits on every schedule."""
    schedule, x0 = build(name), jnp.asarray(levels_alike(64), jnp.float32)
    points = np.arange(17) / 8.0 - 1.0
    denoise = pixels(schedule, points, np.zeros(17), np.full(17, 1 / 17))
    bound = plugs.build("likelihood", "bound(draws=256)", LIKELIHOODS)
    bits = np.asarray(jax.jit(lambda x0, keys: bound(denoise, schedule, x0, keys, 17))(x0, keys(64)))
    assert bits.dtype == np.float32
    error = bits.std() / np.sqrt(64)
    assert error < 0.04
    np.testing.assert_allclose(bits.mean(), UNIFORM_DIGITS, atol=4 * error)


def test_bound_of_a_biased_coin(x64):
    """Of each image, not on average only: -log2 P(image), for pixels that are 1 in one case of ten, else -1."""
    schedule, count = build("rectified_flow"), 4000
    denoise = pixels(schedule, (-1.0, 1.0), (0.0, 0.0), (0.9, 0.1))
    x0 = -jnp.ones((2, 2, 2, 1)).at[1, 0, 0, 0].set(-1.0).at[1, 1, 1, 0].set(-1.0)
    bound = plugs.build("likelihood", "bound(draws=64)", LIKELIHOODS)
    run = jax.jit(lambda x0, keys: bound(denoise, schedule, x0, keys, 2))
    for image, expected in zip(x0, (-np.log2(0.9), -0.5 * np.log2(0.9) - 0.5 * np.log2(0.1)), strict=True):
        bits = np.asarray(run(jnp.broadcast_to(image, (count, 2, 2, 1)), keys(count)))
        np.testing.assert_allclose(bits.mean(), expected, atol=4 * bits.std() / np.sqrt(count))
        assert bits.std() / np.sqrt(count) < 0.02


# ------------------------------------------------------------------------------------------ the bound of a Gaussian


def posterior_loss(name, x0):
    """E -log p(x0 | x_first) for the Gaussian's own posterior, axis by axis, from x_first / alpha = x0 + r e."""
    r2 = (ends(name)[0][1] / ends(name)[0][0]) ** 2
    off = (np.asarray(x0).reshape(-1, 4) - MEAN) @ ROTATION
    total = EIGENVALUES + r2
    variance = EIGENVALUES * r2 / total
    square = (r2 / total * off) ** 2 + (EIGENVALUES / total) ** 2 * r2
    return np.sum(0.5 * np.log(2 * np.pi * variance) + 0.5 * square / variance, axis=-1)


@pytest.mark.parametrize("name", NAMES)
def test_bound_is_tight_for_a_gaussian(name, x64):
    """For each image: prior + diffusion + the exact decoder is -log p(x0), within 4 standard errors (of 0.05 nats).

    The ends' mismatch is below 1e-3. Any other denoiser's bound is higher.
    """
    schedule, count, draws = build(name), 4000, jnp.int32(64)
    x0 = images(3, seed=3)
    run = jax.jit(
        lambda x0, keys, scale: likelihood.diffusion_loss(
            correlated(schedule, EIGENVALUES * scale), schedule, x0, keys, draws, 256
        )
    )
    truth = -stats.multivariate_normal.logpdf(np.asarray(x0).reshape(-1, 4), MEAN, COVARIANCE)
    rest = posterior_loss(name, x0) + np.asarray(likelihood.prior_loss(schedule, x0))
    for image, fixed, expected in zip(x0, rest, truth, strict=True):
        copies = jnp.broadcast_to(image, (count, 2, 2, 1))
        nats = fixed + np.asarray(run(copies, keys(count), 1.0))
        error = nats.std() / np.sqrt(count)
        assert error < 0.07
        np.testing.assert_allclose(nats.mean(), expected, atol=4 * error + 1e-3)
    everywhere, same = images(count), keys(count)
    assert np.mean(run(everywhere, same, 2.0)) > np.mean(run(everywhere, same, 1.0)) + 0.05


def test_prior_loss_is_the_divergence(x64):
    """By quadrature, of N(alpha x0, sigma^2) from N(0, sigma^2) at t = 1, for one pixel of 0.8."""
    _, (alpha, sigma) = ends("vp_linear")
    x = np.linspace(-12, 12, 200_001)
    q, p = stats.norm.logpdf(x, alpha * 0.8, sigma), stats.norm.logpdf(x, 0.0, sigma)
    expected = np.sum(np.exp(q) * (q - p)) * (x[1] - x[0])
    got = likelihood.prior_loss(build("vp_linear"), jnp.full((1, 1, 1, 1), 0.8))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize("levels", [17, 256, 2001])
def test_decoder_is_bayes_rule_over_the_levels(levels, x64):
    """In NumPy; at 2,001 levels, 1/1000 apart, the noise of 1/1000 hides which it was: about 1.4 nats.

    For fewer levels the noise is an eighth of their distance, which hides next to nothing.
    """
    schedule = build("cosine")
    draw = np.random.default_rng(0)
    x0, noise = draw.integers(levels, size=(3, 2, 2, 1)) * 2 / (levels - 1) - 1, draw.normal(size=(3, 2, 2, 1))
    t = schedule.time(jnp.asarray(-2.0 * np.log(max(0.001, 0.25 / (levels - 1)))))
    alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
    logits = stats.norm.logpdf((alpha * x0 + sigma * noise)[..., None], alpha * np.linspace(-1, 1, levels), sigma)
    own = stats.norm.logpdf(alpha * x0 + sigma * noise, alpha * x0, sigma)
    expected = np.sum(logsumexp(logits, axis=-1) - own, axis=(1, 2, 3))
    got = likelihood.reconstruction_loss(schedule, jnp.asarray(x0), jnp.asarray(noise), levels)
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-8)
    assert (expected.mean() > 1.0) == (levels == 2001)


# ------------------------------------------------------------------------------------------ both rows


@pytest.mark.parametrize("row", LIKELIHOODS)
def test_bits_depend_on_the_image_and_its_key_alone(row):
    schedule = build("rectified_flow")
    method = plugs.build("likelihood", row, LIKELIHOODS)
    run = jax.jit(lambda x0, keys: method(two_modes(schedule), schedule, x0, keys, 17))
    x0, own, order = jnp.asarray(levels_alike(5), jnp.float32), keys(5), np.array([3, 1, 4, 0, 2])
    whole = np.asarray(run(x0, own))
    np.testing.assert_allclose(run(x0[order], own[order]), whole[order], rtol=1e-4)
    changed = np.asarray(run(x0.at[0].mul(0.5), own.at[1].set(jax.random.key(9))))
    np.testing.assert_allclose(changed[2:], whole[2:], rtol=1e-4)
    assert np.all(np.abs(changed[:2] / whole[:2] - 1.0) > 1e-3)


@pytest.mark.parametrize("text", ["flow(steps=0)", "flow(probes=0)", "bound(draws=0)", "bound(steps=3)", "flows"])
def test_impossible_options_are_refused(text):
    with pytest.raises(UserError, match=r"family.likelihood.*(flow|bound)"):
        plugs.build("family.likelihood", text, LIKELIHOODS)
