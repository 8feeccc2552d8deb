"""Likelihoods of pixels: they sum to 1 over all images, agree with SciPy, and draw what they say."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from diffusion_jax import plugs, rng
from diffusion_jax.errors import UserError
from diffusion_jax.variational.likelihoods import LIKELIHOODS

pytestmark = pytest.mark.usefixtures("quick_compilation")


def build(text, channels, levels):
    return plugs.build("family.pixels", text, LIKELIHOODS, channels=channels, levels=levels)


log_prob = jax.jit(lambda row, *arguments: row.log_prob(*arguments), static_argnums=0)
draw = jax.jit(lambda row, *arguments: row.draw(*arguments), static_argnums=0)


def keys(count, seed=0):
    return rng.example_keys(jax.random.key(seed), jnp.arange(count))


def params(row, count, seed=0, spread=1.0):
    """The decoder's numbers for one pixel, at random, the same for all of `count` images."""
    numbers = spread * np.random.default_rng(seed).normal(size=(1, 1, 1, row.outputs))
    return jnp.asarray(np.broadcast_to(numbers, (count, 1, 1, row.outputs)), jnp.float32)


def grey(levels):
    return np.linspace(-1.0, 1.0, levels)


def all_pixels(channels, levels):
    """Every pixel that there is, one an image: f32[levels^channels,1,1,channels]."""
    pixels = np.array(list(itertools.product(grey(levels), repeat=channels)), np.float32)
    return jnp.asarray(pixels[:, None, None])


def probabilities(row, channels, levels, seed=0, spread=1.0):
    pixels = all_pixels(channels, levels)
    p = params(row, len(pixels), seed, spread)
    return np.exp(np.asarray(log_prob(row, p, pixels, keys(len(pixels))), np.float64)), np.asarray(pixels)[:, 0, 0]


DISCRETE = [
    ("bernoulli", 1, 2),
    ("bernoulli", 1, 17),
    ("bernoulli", 3, 4),
    ("discretised_logistic_mixture(components=1)", 1, 2),
    ("discretised_logistic_mixture", 1, 17),
    ("discretised_logistic_mixture", 1, 256),
    ("discretised_logistic_mixture(components=3)", 3, 9),
]


@pytest.mark.parametrize("spread", [1.0, 6.0], ids=["wide", "narrow"])
@pytest.mark.parametrize(("text", "channels", "levels"), DISCRETE)
def test_probabilities_of_all_pixels_sum_to_1(text, channels, levels, spread):
    p, _ = probabilities(build(text, channels, levels), channels, levels, spread=spread)
    np.testing.assert_allclose(p.sum(), 1.0, rtol=1e-4)
    assert p.max() < 1.0


@pytest.mark.parametrize(("text", "channels", "levels"), [row for row in DISCRETE if row[2] < 100])
def test_draws_are_as_frequent_as_their_probabilities(text, channels, levels):
    """Every pixel that there is, over 20,000 draws; all lie on the grey levels."""
    row, count = build(text, channels, levels), 20_000
    p, _ = probabilities(row, channels, levels)
    drawn = np.asarray(draw(row, params(row, count), keys(count)))[:, 0, 0]
    which = np.round((drawn + 1.0) / 2.0 * (levels - 1)).astype(int)
    np.testing.assert_allclose(drawn, -1.0 + which * 2.0 / (levels - 1), atol=1e-6)
    number = which @ (levels ** np.arange(channels)[::-1])
    frequency = np.bincount(number, minlength=len(p)) / count
    # 5 standard deviations of a binomial share, and of one draw where hardly any is expected
    assert np.all(np.abs(frequency - p) < 5.0 * np.sqrt(p / count) + 5.0 / count)


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_add_up_and_images_stand_alone(channels):
    """log P of an image is the sum over its pixels, and none of another image's."""
    row = build("discretised_logistic_mixture", channels, 17)
    generator = np.random.default_rng(0)
    numbers = jnp.asarray(generator.normal(size=(2, 2, 3, row.outputs)), jnp.float32)
    image = jnp.asarray(grey(17)[generator.integers(17, size=(2, 2, 3, channels))], jnp.float32)
    whole = log_prob(row, numbers, image, keys(2))
    alone = lambda x: x.reshape(12, 1, 1, -1)
    single = log_prob(row, alone(numbers), alone(image), keys(12))
    np.testing.assert_allclose(whole, np.asarray(single).reshape(2, 6).sum(1), rtol=1e-5)


# ------------------------------------------------------------------------------------------ rows


@pytest.mark.parametrize("levels", [2, 17])
def test_bernoulli_is_the_binomial(levels):
    """SciPy's, of levels - 1 bits; for two levels the cross-entropy of a bit."""
    row = build("bernoulli", 1, levels)
    p, _ = probabilities(row, 1, levels)
    of_one = 1.0 / (1.0 + np.exp(-float(params(row, 1)[0, 0, 0, 0])))
    np.testing.assert_allclose(p, stats.binom(levels - 1, of_one).pmf(np.arange(levels)), rtol=1e-4)
    np.testing.assert_allclose(row.mean(params(row, 1)), [[[[2.0 * of_one - 1.0]]]], rtol=1e-4)


def test_logistic_cells_are_differences_of_scipys_cdf():
    """A mixture by hand, with the tails at the ends; the second scale is below the least, e^-7 255 / 16."""
    row = build("discretised_logistic_mixture(components=2)", 1, 17)
    logits, means, log_scales = np.array([0.3, -0.9]), np.array([-0.2, 0.5]), np.array([-1.5, -9.0])
    numbers = jnp.asarray(np.concatenate([logits, means, log_scales]), jnp.float32).reshape(1, 1, 1, 6)
    edges = np.concatenate([[-np.inf], grey(17)[1:] - 1.0 / 16.0, [np.inf]])[:, None]
    cells = np.diff(
        stats.logistic(means, np.exp(np.maximum(log_scales, np.log(np.exp(-7.0) * 255.0 / 16.0)))).cdf(edges), axis=0
    )
    weights = np.exp(logits) / np.exp(logits).sum()
    pixels = all_pixels(1, 17)
    got = log_prob(row, jnp.broadcast_to(numbers, (17, 1, 1, 6)), pixels, keys(17))
    np.testing.assert_allclose(np.exp(got), cells @ weights, rtol=1e-4, atol=1e-7)


def test_channels_follow_earlier_ones():
    """One component, 256 levels: m_g + a r, m_b + b r + c g, with the coefficients' tanh, by SciPy's logistic."""
    row = build("discretised_logistic_mixture(components=1)", 3, 256)
    m, s, coefficients = np.array([0.1, -0.2, 0.3]), np.array([0.2, 0.1, 0.3]), np.array([0.5, -0.8, 0.4])
    numbers = jnp.asarray(np.concatenate([[0.0], m, np.log(s), coefficients]), jnp.float32).reshape(1, 1, 1, 10)
    x = grey(256)[[150, 90, 201]]
    a, b, c = np.tanh(coefficients)
    means = m + np.array([0.0, a * x[0], b * x[0] + c * x[1]])
    cdf = stats.logistic(means, s).cdf
    expected = np.log(cdf(x + 1.0 / 255.0) - cdf(x - 1.0 / 255.0)).sum()
    got = log_prob(row, numbers, jnp.asarray(x, jnp.float32).reshape(1, 1, 1, 3), keys(1))
    np.testing.assert_allclose(got, [expected], rtol=1e-4)


@pytest.mark.parametrize("channels", [1, 3])
def test_draws_of_the_mixture_have_its_moments(channels):
    """Narrow components far from the ends: the discretised draws' mean is the continuous mixture's."""
    row, count = build("discretised_logistic_mixture(components=2)", channels, 256), 20_000
    generator = np.random.default_rng(3)
    parts = [generator.normal(size=2), 0.2 * generator.normal(size=2 * channels), np.full(2 * channels, -3.5)]
    parts.append(0.5 * generator.normal(size=row.outputs - 2 - 4 * channels))
    numbers = jnp.asarray(np.concatenate(parts), jnp.float32).reshape(1, 1, 1, -1)
    drawn = np.asarray(draw(row, jnp.broadcast_to(numbers, (count, 1, 1, row.outputs)), keys(count)), np.float64)
    np.testing.assert_allclose(drawn.mean((0, 1, 2)), np.asarray(row.mean(numbers))[0, 0, 0], atol=0.01)
    if channels == 1:
        w = np.exp(parts[0]) / np.exp(parts[0]).sum()
        spread = w @ (parts[1] - w @ parts[1]) ** 2
        np.testing.assert_allclose(drawn.var(), spread + np.exp(-7.0) * np.pi**2 / 3.0, rtol=0.05)


@pytest.mark.parametrize("learned", [False, True])
def test_gaussian_is_scipys_and_bounds_the_grey_level_from_below(learned):
    """The mean over the noise of log p(x + u) + log step is at most the log of the cell's integral, and near it."""
    row = build(f"gaussian(std=0.3,learned={learned})", 1, 17)
    assert row.outputs == 1 + learned
    numbers = jnp.asarray([0.2, 0.4][: row.outputs], jnp.float32).reshape(1, 1, 1, -1)
    p = stats.norm(0.2, 0.3 * np.exp(0.4) if learned else 0.3)
    count, level, step = 4000, grey(17)[5], 2.0 / 16.0
    pixels = jnp.full((count, 1, 1, 1), level, jnp.float32)
    many = jnp.broadcast_to(numbers, (count, 1, 1, row.outputs))
    got = np.asarray(log_prob(row, many, pixels, keys(count)), np.float64)
    at = np.linspace(level - step / 2.0, level + step / 2.0, 2001)
    np.testing.assert_allclose(got.mean(), p.logpdf(at).mean() + np.log(step), atol=5.0 * got.std() / np.sqrt(count))
    assert got.min() >= p.logpdf(at).min() + np.log(step) - 1e-4
    assert got.max() <= p.logpdf(at).max() + np.log(step) + 1e-4
    assert got.mean() < np.log(p.cdf(at[-1]) - p.cdf(at[0])) < got.mean() + 0.05
    drawn = np.asarray(draw(row, many, keys(count)))
    np.testing.assert_allclose([drawn.mean(), drawn.std()], [0.2, p.std()], atol=0.03)
    assert float(row.mean(numbers)[0, 0, 0, 0]) == np.float32(0.2)


@pytest.mark.parametrize("far", [30.0, 300.0])
@pytest.mark.parametrize("text", [*LIKELIHOODS, "gaussian(learned=True)"])
def test_gradients_are_finite_far_from_the_image(text, far):
    """A pixel that the decoder holds for all but impossible, with scales whose exp float32 has not."""
    row = build(text, 1, 17)
    numbers = jnp.full((2, 1, 1, row.outputs), far).at[1].set(-far)
    pixels = jnp.asarray([-1.0, 1.0]).reshape(2, 1, 1, 1)
    value, gradient = jax.jit(jax.value_and_grad(lambda p: jnp.sum(row.log_prob(p, pixels, keys(2)))))(numbers)
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))
    assert np.all(np.isfinite(draw(row, numbers, keys(2))))


@pytest.mark.parametrize(
    ("text", "channels", "says"),
    [
        ("gaussian(std=0.0)", 1, "std must be positive"),
        ("discretised_logistic_mixture(components=0)", 1, "components must be at least 1"),
        ("discretised_logistic_mixture", 4, "1 or 3 channels"),
        ("bernouli", 1, "did you mean 'bernoulli'"),
        ("bernoulli(levels=3)", 1, "no option 'levels'"),
    ],
)
def test_impossible_rows_are_refused(text, channels, says):
    with pytest.raises(UserError, match=says):
        build(text, channels, 17)
