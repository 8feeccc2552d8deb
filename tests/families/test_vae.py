"""The VAE family: its loss, its bits per dimension where the entropy is known, and the way to the latents and back."""

import functools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from diffusion_jax import families, rng
from diffusion_jax.errors import UserError
from diffusion_jax.networks.vae import Autoencoder
from diffusion_jax.networks.vae.blocks import Inferred
from diffusion_jax.types import Context, ImageSpec

LABELLED = ImageSpec(size=8, channels=1, num_classes=3, levels=4)
FLAT = "flat(latents=3,channels=8,multipliers=(1,1))"
LADDER = "ladder(channels=8,multipliers=(1,1),levels=(1,2),latents=1)"
MIXTURE = "discretised_logistic_mixture(components=2)"


pytestmark = pytest.mark.usefixtures("quick_compilation")


@functools.cache
def family(network=LADDER, pixels=MIXTURE, spec=LABELLED, **fields):
    return families.build({"name": "vae", "network": network, "pixels": pixels, **fields}, spec, "float32")


@functools.cache
def weights(network=LADDER, pixels=MIXTURE):
    """Parameters at random, none of them 0: at initialisation the posterior is the prior."""
    generator = np.random.default_rng(1)

    def draw(leaf):
        spread = 0.1 if leaf.ndim == 1 else np.prod(leaf.shape[:-1]) ** -0.5
        return jnp.asarray(spread * generator.normal(size=leaf.shape), leaf.dtype)

    return jax.tree.map(draw, jax.eval_shape(family(network, pixels).init, jax.random.key(0))[0])


def batch(count, spec=LABELLED):
    """Grey levels that are uniform and independent: log2(levels) bits of entropy a dimension."""
    grey = np.random.default_rng(0).integers(spec.levels, size=(count, *spec.shape))
    return {
        "image": jnp.asarray(2.0 * grey / (spec.levels - 1) - 1.0, jnp.float32),
        "label": jnp.arange(count, dtype=jnp.int32) % spec.num_classes,
        "index": jnp.arange(count, dtype=jnp.int32),
    }


def keys(count):
    return rng.example_keys(jax.random.key(5), jnp.arange(count))


@functools.cache
def compiled_loss(**fields):
    def loss(params, batch, step):
        key = jax.random.key(0)
        ctx = Context(batch=batch, key=key, common=key, step=step, extra={}, ema={}, frozen={})
        value, aux = family(**fields).players[0].loss(params, ctx)
        return value, aux.metrics

    return jax.jit(loss)


def loss(batch, step=0, **fields):
    value, metrics = compiled_loss(**fields)(weights(), batch, jnp.int32(step))
    return float(value), {key: float(metric) for key, metric in metrics.items()}


# ------------------------------------------------------------------------------------------ training


def test_the_loss_weighs_the_kl():
    """In nats a dimension: -log p + beta KL, of which the log has the KL and, in bits a dimension, the bound."""
    plain, metrics = loss(batch(4))
    assert metrics["kl"] > 1.0
    np.testing.assert_allclose(plain, metrics["bits_per_dimension"] * math.log(2.0), rtol=1e-5)
    without, _ = loss(batch(4), beta=0.0)
    np.testing.assert_allclose(plain - without, metrics["kl"] / 64.0, rtol=1e-3)
    for step, share in ((0, 0.0), (25, 0.75), (100, 3.0), (200, 3.0)):
        warm, _ = loss(batch(4), step=step, beta=3.0, warmup=100)
        np.testing.assert_allclose(warm, without + share * metrics["kl"] / 64.0, rtol=1e-4)


def test_free_bits_are_bits_of_each_level():
    """All three levels below 1,000 bits: then the latents cost 3,000 bits, whatever they say."""
    without, _ = loss(batch(4), beta=0.0)
    np.testing.assert_allclose(loss(batch(4), free_bits=1000.0)[0], without + 3000.0 * math.log(2.0) / 64.0, rtol=1e-5)


def test_a_batch_costs_the_mean_of_its_parts():
    """Free bits, too, which the paper counts over the batch."""
    whole, fields = batch(4), {"free_bits": 2.0}
    parts = [loss({key: value[part] for key, value in whole.items()}, **fields)[0] for part in (slice(2), slice(2, 4))]
    np.testing.assert_allclose(loss(whole, **fields)[0], np.mean(parts), rtol=1e-5)


# ------------------------------------------------------------------------------------------ likelihood


@pytest.mark.parametrize(
    "pixels",
    [
        MIXTURE,
        *(pytest.param(text, marks=pytest.mark.slow) for text in ("bernoulli", "gaussian(std=0.5,learned=True)")),
    ],
)
def test_bits_per_dimension_of_uniform_noise(pixels):
    """Its entropy is log2(levels) = 2 bits: no model is below. The ELBO is above the importance-weighted bound."""
    data = batch(200)
    elbo, importance = (
        np.asarray(jax.jit(family(LADDER, pixels, likelihood=bound).nll)(weights(LADDER, pixels), data, keys(1)[0]))
        for bound in ("elbo(draws=8)", "importance(draws=32)")
    )
    assert elbo.shape == importance.shape == (200,)
    assert elbo.mean() > importance.mean() > 2.0


FINE = ImageSpec(size=4, channels=1, num_classes=0, levels=2**16)
"""So many levels that the noise of one level's width is nothing."""


def linear_gaussian(count=64, latents=3):
    """Images f32[n,4,4,1], -log2 P of each a dimension, and the VAE at its optimum on them, with its weights.

    Probabilistic PCA (Tipping & Bishop 1999): z ~ N(0, 1), x = W z + mu + N(0, s^2). With eigenvalues a and
    eigenvectors U of the images' covariance the likelihood of the images is largest at

        W = U (a - s^2)^(1/2) of the largest a,   s^2 = the mean of all other a                        (eq. 7 and 8)
        p(x) = N(mu, W W^T + s^2),   p(z | x) = N(M^(-1) W^T (x - mu), s^2 M^(-1)),   M = W^T W + s^2

    M is diag(a) here, so that the posterior is a diagonal one, as the family's is.
    """
    generator = np.random.default_rng(0)
    x = generator.normal(size=(count, latents)) @ (0.2 * generator.normal(size=(latents, 16)))
    x = (x + 0.1 * generator.normal(size=(count, 16)) + 0.05).astype(np.float32)
    mu, (a, U) = x.mean(0, dtype=np.float64), np.linalg.eigh(np.cov(x.T.astype(np.float64), bias=True))
    s2, a, U = a[:-latents].mean(), a[-latents:], U[:, -latents:]
    W = U * np.sqrt(a - s2)
    nats = -stats.multivariate_normal(mu, W @ W.T + s2 * np.eye(16)).logpdf(x)
    bits = (nats / 16.0 - np.log(2.0 / (FINE.levels - 1))) / np.log(2.0)  # P = p step^16

    def decode(params, z, label):
        return (z @ params["W"].T + params["mu"][None]).reshape(-1, 4, 4, 1)

    def infer(params, x, label, eps):
        mean = (x.reshape(len(x), -1) - params["mu"][None]) @ (params["W"] / params["a"][None]) + params["off"]
        log_std = jnp.broadcast_to(0.5 * jnp.log(s2 / params["a"])[None], mean.shape)
        return Inferred(mean, log_std, decode(params, mean + jnp.exp(log_std) * eps, label))

    params = {"W": W, "mu": mu, "a": a, "off": np.zeros(())}
    network = Autoencoder(init=None, infer=infer, decode=decode, levels=(latents,))
    weights = {"autoencoder": jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)}
    data = {"image": jnp.asarray(x.reshape(-1, 4, 4, 1)), "index": jnp.arange(count, dtype=jnp.int32)}

    def nll(weights, **fields):
        it = family(FLAT, f"gaussian(std={s2**0.5})", FINE, **fields).players[0].loss.__self__
        return np.asarray(jax.jit(replace(it, autoencoder=network).family().nll)(weights, data, keys(1)[0]))

    return nll, weights, bits, s2 / a


def test_at_the_optimum_on_linear_gaussian_data_both_bounds_are_the_exact_likelihood():
    """With the exact posterior p(x | z) p(z) / q(z | x) is p(x) at every z: image by image, with any number of draws.

    The ELBO is that in the mean over its draws. Off the posterior's mean by d it is worse by its divergence, the sum of
    d^2 / (2 variance) nats (appendix B of Kingma & Welling 2014), and the importance-weighted bound by less.
    """
    nll, weights, bits, variance = linear_gaussian()
    for draws in (1, 5):
        np.testing.assert_allclose(nll(weights, likelihood=f"importance(draws={draws})"), bits, atol=2e-4)
    elbo = nll(weights, likelihood="elbo(draws=500)")
    np.testing.assert_allclose(elbo, bits, atol=0.03)
    np.testing.assert_allclose(elbo.mean(), bits.mean(), atol=0.002)
    off = {"autoencoder": weights["autoencoder"] | {"off": jnp.float32(0.3)}}
    gap = np.sum(0.3**2 / (2.0 * variance)) / (16.0 * np.log(2.0))
    assert gap > 0.02
    np.testing.assert_allclose(nll(off, likelihood="elbo(draws=500)").mean(), bits.mean() + gap, atol=0.1 * gap)
    assert bits.mean() < nll(off, likelihood="importance(draws=5)").mean() < bits.mean() + 0.9 * gap


# ------------------------------------------------------------------------------------------ latents


@functools.cache
def compiled(network, part):
    it = family(network)
    return jax.jit(it.generate if part == "generate" else getattr(it.latent, part))


@pytest.mark.parametrize("network", [FLAT, LADDER])
def test_images_are_decoded_draws(network):
    """Bit by bit; the latents are N(0, temperature^2), and the temperature is all that drawing reads."""
    it, condition = family(network), {"label": jnp.arange(4) % 3}
    options = it.sampling({"temperature": 0.7})
    z = compiled(network, "draw")(keys(4), options)
    assert z.shape == (4, *it.latent.shape) == (4, 3 if network == FLAT else 2 * 16 + 64)
    arguments = keys(4), condition, options
    images = compiled(network, "generate")(weights(network), *arguments)
    np.testing.assert_array_equal(images, compiled(network, "decode")(weights(network), z, *arguments))
    many = np.asarray(compiled(network, "draw")(keys(3000), options))
    np.testing.assert_allclose([many.mean(), many.std()], [0.0, 0.7], atol=0.03)


@pytest.mark.parametrize("network", [FLAT, LADDER])
def test_a_draw_lies_on_the_grey_levels_and_has_the_mean_that_is_shown(network):
    it, n = family(network), 4000
    arguments = jnp.zeros((n, *it.latent.shape)), keys(n), {"label": jnp.zeros(n, jnp.int32)}
    drawn, mean = (
        np.asarray(compiled(network, "decode")(weights(network), *arguments, it.sampling({"show": show})))
        for show in ("draw", "mean")
    )
    np.testing.assert_allclose(drawn * 1.5 + 1.5, np.round(drawn * 1.5 + 1.5), atol=1e-5)
    np.testing.assert_array_equal(mean[0], mean[-1])
    assert drawn.std(0).min() > 0.0


def test_encoding_gives_the_posterior_means_and_decoding_leads_back():
    """Each level's mean given the means above it: what the posterior is where eps = 0, and no key matters."""
    it, data = family(), batch(4)
    options = it.sampling({"show": "mean"})
    z = compiled(LADDER, "encode")(weights(), data["image"], keys(4), data, options)
    model = it.players[0].loss.__self__
    q = model.infer(weights(), data["image"], data, jnp.zeros_like(z))
    np.testing.assert_allclose(z, q.mean, rtol=1e-4, atol=1e-5)
    back = compiled(LADDER, "decode")(weights(), z, keys(4), data, options)
    np.testing.assert_allclose(back, np.clip(model.pixels.mean(q.pixels), -1.0, 1.0), rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"beta": -1.0}, "family.beta = -1"),
        ({"free_bits": math.inf}, "family.free_bits = inf"),
        ({"warmup": -5}, "family.warmup = -5"),
        ({"pixels": "laplace"}, "family.pixels = 'laplace'"),
        ({"likelihood": "importanc"}, "did you mean 'importance'"),
        ({"network": "dit"}, "family.network = 'dit'"),
    ],
)
def test_impossible_settings_are_refused(fields, says):
    with pytest.raises(UserError, match=says):
        families.build({"name": "vae", **fields}, LABELLED, "float32")


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"temperature": 0.0}, "sample.temperature = 0.0"),
        ({"show": "mode"}, "sample.show = 'mode'.*draw, mean"),
        ({"steps": 3}, "sample.steps"),
    ],
)
def test_impossible_options_are_refused(section, says):
    with pytest.raises(UserError, match=says):
        family().sampling(section)
