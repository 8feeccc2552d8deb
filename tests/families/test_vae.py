"""The VAE family: its loss, its bits per dimension where the entropy is known, and the way to the latents and back."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import families, rng
from diffusion_jax.errors import UserError
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


@pytest.mark.parametrize("pixels", ["bernoulli", MIXTURE, "gaussian(std=0.5,learned=True)"])
def test_bits_per_dimension_of_uniform_noise(pixels):
    """Its entropy is log2(levels) = 2 bits: no model is below. The ELBO is above the importance-weighted bound."""
    data = batch(200)
    elbo, importance = (
        np.asarray(jax.jit(family(LADDER, pixels, likelihood=bound).nll)(weights(LADDER, pixels), data, keys(1)[0]))
        for bound in ("elbo(draws=8)", "importance(draws=32)")
    )
    assert elbo.shape == importance.shape == (200,)
    assert elbo.mean() > importance.mean() > 2.0


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
