"""The hybrid objective that learns the ancestral step's variance."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, optimize, stats

from diffusion_jax import plugs, rng
from diffusion_jax.diffusion.objectives.learned_variance import LearnedVariance, gaussian_kl, level_nll
from diffusion_jax.diffusion.prediction import PREDICTIONS
from diffusion_jax.diffusion.schedule import SCHEDULES
from diffusion_jax.diffusion.solvers import SOLVERS
from diffusion_jax.diffusion.time_sampling import TIME_SAMPLINGS
from diffusion_jax.diffusion.weighting import WEIGHTINGS
from diffusion_jax.types import Denoised

pytestmark = pytest.mark.usefixtures("quick_compilation")


def build(prediction="eps", schedule="vp_linear", times="uniform", levels=256, **options):
    bound = PREDICTIONS[prediction](schedule=plugs.build("schedule", schedule, SCHEDULES))
    times, weighting = plugs.build("times", times, TIME_SAMPLINGS), WEIGHTINGS["simple"]()
    return LearnedVariance(prediction=bound, time_sampling=times, weighting=weighting, levels=levels, **options)


def keys(count, seed=0):
    return rng.example_keys(jax.random.key(seed), jnp.arange(count))


def quantiles(count, steps):
    """As many of each step."""
    return jnp.asarray((np.arange(count) % steps + 0.5) / steps)


def ideal(objective, std, v):
    """The network that knows the mean of y for data N(0, std^2), and says v(t) f[B]."""
    schedule = objective.prediction.schedule

    def predict(x, t):
        alpha, sigma = (c.reshape(-1, 1, 1, 1) for c in (schedule.alpha(t), schedule.sigma(t)))
        off = x / (alpha**2 * std**2 + sigma**2)
        y = objective.prediction.target(alpha * std**2 * off, sigma * off, t)
        return jnp.concatenate([y, 2.0 * v(t).reshape(-1, 1, 1, 1) * jnp.ones_like(x) - 1.0], axis=-1)

    return predict


def curves(objective, i):
    """alpha and sigma at s = (i - 1) / T and t = i / T, in NumPy."""
    schedule, t = objective.prediction.schedule, jnp.asarray([i - 1, i], jnp.float64) / objective.steps
    return (*np.asarray(schedule.alpha(t)), *np.asarray(schedule.sigma(t)))


def posterior_variance(objective, i, std):
    """Var(x_s | x_t) of data N(0, std^2): x_s and x_t are jointly normal, x_t = a x_s + noise."""
    alpha_s, alpha_t, sigma_s, sigma_t = curves(objective, i)
    var_s, var_t = alpha_s**2 * std**2 + sigma_s**2, alpha_t**2 * std**2 + sigma_t**2
    return var_s - (alpha_t / alpha_s * var_s) ** 2 / var_t


def bounds(objective, i):
    """beta tilde and beta of Ho et al. 2020 (section 2), from alpha-bar; at i = 1 the former is that of i = 2."""
    beta_tilde = []
    for j in (max(i, 2), i):
        alpha_s, alpha_t, sigma_s, sigma_t = curves(objective, j)
        beta = 1.0 - (alpha_t / alpha_s) ** 2
        beta_tilde.append(sigma_s**2 / sigma_t**2 * beta)
    return beta_tilde[0], beta


# ------------------------------------------------------------------------------------------ the pieces


@pytest.mark.parametrize(
    ("q", "p"), [((0.3, 0.5), (0.3, 0.5)), ((0.3, 0.5), (-0.2, 0.8)), ((1.0, 0.01), (1.1, 0.1)), ((0.0, 2.0), (1, 0.3))]
)
def test_divergence_of_two_gaussians(q, p, x64):
    """By quadrature."""
    integrand = lambda x: stats.norm.pdf(x, *q) * (stats.norm.logpdf(x, *q) - stats.norm.logpdf(x, *p))
    expected, _ = integrate.quad(integrand, q[0] - 12 * q[1], q[0] + 12 * q[1], epsabs=1e-11, limit=200)
    got = gaussian_kl(*(jnp.float64(f) for mean, std in (q, p) for f in (mean, 2 * np.log(std))))
    np.testing.assert_allclose(got, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize(("mean", "std"), [(0.1, 0.2), (-0.95, 0.05), (1.7, 0.6), (0.3, 0.003)])
def test_levels_have_the_mass_of_their_cells(levels, mean, std, x64):
    """All of the mass, in scipy's words where these have digits."""
    x = np.linspace(-1, 1, levels)
    got = np.asarray(level_nll(jnp.asarray(x), jnp.full(levels, mean), jnp.full(levels, 2 * np.log(std)), levels))
    np.testing.assert_allclose(np.exp(-got).sum(), 1.0, rtol=1e-9)
    edges = np.concatenate([[-np.inf], (x[1:] + x[:-1]) / 2, [np.inf]])
    mass = np.diff(stats.norm.cdf(edges, mean, std))
    np.testing.assert_allclose(np.exp(-got), mass, atol=1e-12)


def test_far_levels_keep_a_finite_loss_and_gradient():
    """In float32, 200 standard deviations away on either side: about 200^2 / 2 nats, steeper with the distance."""
    x0 = jnp.float32([-1.0, 0.0, 0.0, 1.0])
    mean = jnp.float32([1.0, 1.0, -1.0, -1.0])
    log_variance = jnp.full(4, 2 * np.log(0.005), jnp.float32)
    nll = level_nll(x0, mean, log_variance, 256)
    np.testing.assert_allclose(nll, ((np.abs(x0 - mean) - 1 / 255) / 0.005) ** 2 / 2, rtol=0.01)
    gradient = jax.grad(lambda m: jnp.sum(level_nll(x0, m, log_variance, 256)))(mean)
    assert np.all(np.isfinite(gradient))
    np.testing.assert_array_equal(np.sign(gradient), [1, 1, -1, -1])


@pytest.mark.parametrize("i", [1, 2, 50, 100])
def test_variances_are_beta_tilde_and_beta(i, x64):
    objective = build(steps=100)
    t = jnp.asarray([i / 100])
    got = np.exp(np.asarray(objective.log_variances(t - 0.01, t))).ravel()
    np.testing.assert_allclose(got, bounds(objective, i), rtol=1e-9)


def test_the_loss_and_the_sampler_mean_the_same_variance(x64):
    """DDPM's step with a spread v adds noise of the variance that the loss scores."""
    objective, v, count = build(steps=10), 0.3, 20_000
    s, t = jnp.asarray(0.1), jnp.asarray(0.2)
    still = lambda x, t: Denoised(jnp.zeros_like(x), jnp.zeros_like(x), jnp.full_like(x, v))
    x = jnp.zeros((count, 1, 1, 1))
    noise, _ = SOLVERS["ddpm"]().step(still, objective.prediction.schedule, x, t, s, (), keys(count))
    least, largest = objective.log_variances(s[None], t[None])
    expected = np.exp(v * float(largest[0]) + (1 - v) * float(least[0]))
    np.testing.assert_allclose(np.var(np.asarray(noise)), expected, rtol=4 * np.sqrt(2 / count))
    assert abs(np.exp(float(largest[0] - least[0])) - 1.0) > 0.2


# ------------------------------------------------------------------------------------------ who learns what


@functools.cache
def gradients(vlb_weight):
    """Of the loss with respect to the two halves of an output."""
    objective = build("v", "cosine", steps=20, vlb_weight=vlb_weight)
    x0 = jnp.asarray(np.random.default_rng(0).integers(256, size=(20, 2, 2, 1)) * 2 / 255 - 1, jnp.float32)
    output = jnp.asarray(np.random.default_rng(1).normal(size=(20, 2, 2, 2)), jnp.float32)
    loss = lambda output: jnp.sum(objective.loss(lambda x, t: output, x0, quantiles(20, 20), keys(20))[0])
    return [np.asarray(g) for g in jnp.split(jax.grad(loss)(output), 2, axis=-1)]


def test_the_bound_moves_the_variance_alone():
    """The mean's gradient is L_simple's whatever lambda is; the variance's is lambda times L_vlb's."""
    (mean, variance), (mean_2, variance_2), (_, variance_0) = gradients(0.1), gradients(0.2), gradients(0.0)
    np.testing.assert_array_equal(mean, mean_2)
    np.testing.assert_allclose(variance_2, 2.0 * variance, rtol=1e-5)
    np.testing.assert_array_equal(variance_0, 0.0)
    assert np.all(np.abs(variance) > 0.0)
    assert np.all(np.abs(mean) > 0.0)


def test_without_the_bound_it_is_the_plain_loss(x64):
    """mean (y - network)^2, with x and y from the stated noise, in NumPy."""
    objective = build("v", "cosine", steps=20, vlb_weight=0.0)
    x0 = np.random.default_rng(0).uniform(-1, 1, size=(20, 2, 2, 1))
    losses, t = objective.loss(
        lambda x, t: jnp.concatenate([0.5 * x, x], -1), jnp.asarray(x0), quantiles(20, 20), keys(20)
    )
    np.testing.assert_allclose(t, np.arange(1, 21) / 20, rtol=1e-12)
    schedule = objective.prediction.schedule
    alpha, sigma = (np.asarray(f(t)).reshape(-1, 1, 1, 1) for f in (schedule.alpha, schedule.sigma))
    eps = np.asarray(rng.normal(keys(20), (2, 2, 1), jnp.float64))
    expected = np.mean((alpha * eps - sigma * x0 - 0.5 * (alpha * x0 + sigma * eps)) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(losses, expected, rtol=1e-9)


def test_what_the_sampler_is_told(x64):
    """The first half of the channels is y, as without a variance; the second's -1, 0, 1 and 3 are 0, 1/2, 1 and 1."""
    objective, x = build("v", "cosine"), jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 2, 1)))
    y = jnp.asarray(np.random.default_rng(1).normal(size=(1, 2, 2, 1)))
    w = jnp.asarray([-1.0, 0.0, 1.0, 3.0]).reshape(1, 2, 2, 1)
    assert objective.channels(3) == 6
    t = jnp.asarray(0.4)
    denoised = objective.denoised(x, jnp.concatenate([y, w], axis=-1), t)
    alpha, sigma = (
        np.asarray(f(t)) for f in (objective.prediction.schedule.alpha, objective.prediction.schedule.sigma)
    )
    np.testing.assert_allclose(denoised.x0, alpha * x - sigma * y, rtol=1e-9)  # Salimans & Ho 2022, appendix D
    np.testing.assert_allclose(denoised.eps, sigma * x + alpha * y, rtol=1e-9)
    np.testing.assert_array_equal(denoised.spread.reshape(-1), [0.0, 0.5, 1.0, 1.0])


@pytest.mark.parametrize("schedule", ["vp_linear", "rectified_flow"])
def test_uniform_quantiles_fall_on_all_steps_alike(schedule, x64):
    """The first step too, though training elsewhere looks at no time before first_time (0.001 on rectified flow)."""
    objective = build("v", schedule, steps=1000)
    (s, t), slope = objective.step_of(quantiles(4000, 4000))
    np.testing.assert_allclose(t, np.repeat(np.arange(1, 1001), 4) / 1000, rtol=1e-12)
    np.testing.assert_allclose(s, t - 0.001, atol=1e-12)
    np.testing.assert_allclose(slope, 1.0, rtol=1e-9)


def test_other_densities_estimate_the_same_bound(x64):
    """Steps by a density of times, each counted by 1 / density, sum to what the plain sum over the steps is."""
    steps, count = 4, 4 * 50_000
    objective = build("v", "rectified_flow", "logit_normal(mean=1.0,std=2.0)", steps=steps)
    (_, t), slope = objective.step_of(quantiles(count, count))
    value = np.array([3.0, -1.0, 0.5, 2.0])
    measured = np.mean(np.asarray(slope) * value[np.rint(np.asarray(t) * steps).astype(int) - 1])
    np.testing.assert_allclose(measured, value.mean(), atol=0.02)
    assert abs(np.mean(value[np.rint(np.asarray(t) * steps).astype(int) - 1]) - value.mean()) > 0.1


# ------------------------------------------------------------------------------------------ what is learned


@pytest.mark.parametrize("i", [2, 5, 9])
@pytest.mark.parametrize("std", [0.0, 0.3, 1.0])
def test_the_best_variance_is_the_true_one(std, i, x64):
    """For data N(0, std^2) and the ideal mean, the v that L_vlb likes best gives Var(x_s | x_t).

    A point's is beta tilde and white data's beta (Ho et al. 2020, section 3.2), so v is 0 and 1 there.
    65,536 pixels: 4 standard errors of a variance are 2.2 %.
    """
    objective, count = build(steps=10), 4096
    x0 = std * jax.random.normal(jax.random.key(5), (count, 4, 4, 1))
    u = jnp.full(count, (i - 0.5) / 10)

    @jax.jit
    def loss(v):
        return jnp.mean(objective.loss(ideal(objective, std, lambda t: jnp.full_like(t, v)), x0, u, keys(count))[0])

    best = optimize.minimize_scalar(
        lambda v: float(loss(v)), bounds=(-0.5, 1.5), method="bounded", options={"xatol": 1e-6}
    )
    least, largest = bounds(objective, i)
    variance = np.exp(best.x * np.log(largest) + (1 - best.x) * np.log(least))
    np.testing.assert_allclose(variance, posterior_variance(objective, i, std), rtol=0.022)
    if std != 0.3:
        np.testing.assert_allclose(best.x, std, atol=0.022 / np.log(largest / least))


def test_the_bound_of_the_true_process_is_the_entropy(x64):
    """Gaussian data, ideal means, true variances: then p is q backwards, and L_vlb is tight for any number of steps.

    Bits per dimension of N(0, 0.2^2) on 256 levels: log2(0.2 sqrt(2 pi e) 255 / 2) = 6.72. What is left of the data at
    t = 1 (L_T) is 3e-6 bits. 80,000 pixels a step: within 0.01.
    """
    std, steps, count = 0.2, 25, 25 * 200
    objective = build(steps=steps, vlb_weight=1.0)
    pairs = [(bounds(objective, i), posterior_variance(objective, i, std)) for i in range(1, steps + 1)]
    table = jnp.asarray([np.log(true / least) / np.log(largest / least) for (least, largest), true in pairs])
    predict = ideal(objective, std, lambda t: table[jnp.rint(t * steps).astype(jnp.int32) - 1])
    levels = jnp.rint((std * jax.random.normal(jax.random.key(1), (count, 20, 20, 1)) + 1) * 127.5)
    x0, u = levels / 127.5 - 1, quantiles(count, steps)
    loss = lambda weight: jax.jit(functools.partial(build(steps=steps, vlb_weight=weight).loss, predict))
    hybrid, simple = (float(jnp.mean(loss(weight)(x0, u, keys(count))[0])) for weight in (1.0, 0.0))
    np.testing.assert_allclose(hybrid - simple, np.log2(std * np.sqrt(2 * np.pi * np.e) * 127.5), atol=0.01)


@pytest.mark.parametrize(
    ("prediction", "schedule"),
    [("eps", "ddpm_linear"), ("v", "cosine_discrete"), ("velocity", "rectified_flow"), ("edm", "edm"), ("v", "gvp")],
)
def test_finite_at_every_step(prediction, schedule):
    """In float32, with gradients, from alpha = 0 to sigma = 0, for images at the ends of the range."""
    objective = build(prediction, schedule)
    x0 = jnp.where(jnp.arange(1000).reshape(-1, 1, 1, 1) % 2 == 0, 1.0, -1.0) * jnp.ones((1, 2, 2, 1))
    u = quantiles(1000, 1000)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(scale):
        losses, t = objective.loss(lambda x, t: scale * jnp.concatenate([x, x], axis=-1), x0, u, keys(1000))
        return jnp.mean(losses), (losses, t)

    (_, (losses, t)), gradient = loss(jnp.float32(0.01))
    assert losses.dtype == jnp.float32
    assert np.all(np.isfinite(losses)), np.asarray(t)[~np.isfinite(losses)]
    assert np.isfinite(gradient)
    np.testing.assert_allclose(t, np.arange(1, 1001) / 1000, rtol=1e-6)


@pytest.mark.parametrize(
    ("option", "value"), [("steps", 1), ("levels", 1), ("vlb_weight", -0.1), ("vlb_weight", float("inf"))]
)
def test_impossible_options_are_refused(option, value):
    with pytest.raises(ValueError, match=option):
        build(**{option: value})
