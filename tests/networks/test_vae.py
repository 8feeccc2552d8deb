"""The autoencoders: which latents see what, and the residual posterior against its equations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.errors import UserError
from diffusion_jax.networks import vae
from diffusion_jax.networks.vae.blocks import LOG_STDS
from diffusion_jax.networks.vae.ladder import Level
from diffusion_jax.types import ImageSpec
from tests.arrays import filled, normals

LABELLED = ImageSpec(size=8, channels=1, num_classes=3)
PLAIN = ImageSpec(size=8, channels=3, num_classes=0)
FLAT = "flat(latents=5,channels=8,multipliers=(1,2))"
LADDER = "ladder(channels=8,multipliers=(1,2,1),levels=(1,2,1),latents=2)"
SIZES = {FLAT: (5,), LADDER: (8, 32, 32, 128)}
"""Latents of each level: the ladder's 2 channels at sides 2, 4, 4 and 8."""


pytestmark = pytest.mark.usefixtures("quick_compilation")


@functools.cache
def build(text, spec=LABELLED, precision="float32"):
    return vae.build("family.network", text, spec, precision, 4)


def given(text, spec=LABELLED, count=3):
    """Images, labels, eps."""
    label = jnp.arange(count) % spec.num_classes if spec.num_classes else None
    return jnp.tanh(normals(count, *spec.shape)), label, normals(count, sum(SIZES[text]), seed=2)


@functools.cache
def infer(text, spec=LABELLED, precision="float32"):
    return jax.jit(build(text, spec, precision).infer)


@functools.cache
def decode(text, spec=LABELLED):
    return jax.jit(build(text, spec).decode)


# ------------------------------------------------------------------------------------------ both


@pytest.mark.parametrize(("text", "spec"), [(FLAT, PLAIN), (LADDER, LABELLED)], ids=["flat, plain", "ladder"])
def test_decoding_the_inferred_noises_is_what_the_posterior_saw(text, spec):
    """The way down is one: the prior's ancestral draw from noise = mean + std eps, without the image."""
    params, (x, label, eps) = filled(build(text, spec).init), given(text, spec)
    q = infer(text, spec)(params, x, label, eps)
    assert (q.mean.shape, q.log_std.shape, q.pixels.shape) == (eps.shape, eps.shape, (3, 8, 8, 4))
    again = decode(text, spec)(params, q.mean + jnp.exp(q.log_std) * eps, label)
    np.testing.assert_allclose(again, q.pixels, rtol=1e-3, atol=1e-4)
    assert np.abs(q.pixels - decode(text, spec)(params, eps, label)).max() > 0.01


@pytest.mark.parametrize("text", SIZES)
def test_at_initialisation_the_posterior_is_the_prior(text):
    """Mean 0, std 1, so that every KL is 0; and the image is not seen."""
    network, (x, label, eps) = build(text), given(text)
    params = jax.jit(network.init)(jax.random.key(0))
    q = infer(text)(params, x, label, eps)
    np.testing.assert_array_equal(q.mean, 0.0)
    np.testing.assert_array_equal(q.log_std, 0.0)
    np.testing.assert_allclose(q.pixels, decode(text)(params, eps, label), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("text", SIZES)
def test_rows_are_alone_and_labels_matter(text):
    params, (x, label, eps) = filled(build(text).init), given(text)
    q = infer(text)(params, x, label, eps)
    other = infer(text)(params, x.at[0].set(-x[0]), label.at[0].set(2), eps.at[0].add(1.0))
    for a, b in zip(q, other, strict=True):
        np.testing.assert_allclose(a[1:], b[1:], rtol=1e-4, atol=1e-5)
        assert np.abs(a[0] - b[0]).max() > 0.01
    relabelled = infer(text)(params, x, (label + 1) % 3, eps)
    for a, b in zip(q, relabelled, strict=True):
        assert np.abs(a - b).max() > 0.01
    noise = decode(text)(params, eps, label) - decode(text)(params, eps, (label + 1) % 3)
    assert np.abs(noise).max() > 0.01


@pytest.mark.parametrize("text", SIZES)
def test_bfloat16_is_near_float32(text):
    """And what comes out is float32."""
    params, arguments = filled(build(text).init), given(text)
    exact, rounded = (infer(text, precision=precision)(params, *arguments) for precision in ("float32", "bfloat16"))
    for a, b in zip(exact, rounded, strict=True):
        assert b.dtype == jnp.float32
        assert np.abs(a - b).mean() < 0.05 * np.abs(a).mean()


@pytest.mark.parametrize("name", vae.AUTOENCODERS)
@pytest.mark.parametrize("size", [8, 20])
def test_any_size_that_can_be_halved(name, size):
    """From 8 pixels on; a ladder's latents are as many as 8 channels on each of its sides."""
    spec = ImageSpec(size=size, channels=3, num_classes=0)
    network = vae.build("family.network", name, spec, "float32", 6)
    D = 8 * (size**2 + (size // 2) ** 2 + (size // 4) ** 2) if name == "ladder" else 32
    assert sum(network.levels) == D
    params = jax.eval_shape(network.init, jax.random.key(0))
    shapes = [jax.ShapeDtypeStruct((2, *shape), jnp.float32) for shape in (spec.shape, (D,))]
    q = jax.eval_shape(lambda params, x, eps: network.infer(params, x, None, eps), params, *shapes)
    assert (q.mean.shape, q.pixels.shape) == ((2, D), (2, size, size, 6))


# ------------------------------------------------------------------------------------------ the ladder


def test_a_level_sees_the_levels_above_and_none_below():
    """New eps in level l change the posteriors of all finer levels and of no other."""
    params, (x, label, eps) = filled(build(LADDER).init), given(LADDER)
    ends = np.cumsum(SIZES[LADDER])
    q = infer(LADDER)(params, x, label, eps)
    for begin, end in zip(ends - SIZES[LADDER], ends, strict=True):
        other = infer(LADDER)(params, x, label, eps.at[:, begin:end].multiply(-1.0))
        np.testing.assert_allclose(other.mean[:, :end], q.mean[:, :end], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(other.log_std[:, :end], q.log_std[:, :end], rtol=1e-4, atol=1e-5)
        for finer in ends[ends > end]:
            assert np.abs((other.mean - q.mean)[:, end:finer]).max() > 1e-3


def test_a_level_is_its_equations():
    """z = mu + sigma (m + s eps), added by a matrix: with heads that are their biases, and blocks that do nothing."""
    level = Level(2, jnp.float32)
    y, read, eps = normals(2, 4, 4, 8), normals(2, 4, 4, 8, seed=1), normals(2, 4, 4, 2, seed=2)
    params = filled(lambda key: level.init(key, y, read, eps))["params"]
    for head in ("prior", "posterior"):
        params[head]["conv"]["kernel"] = jnp.zeros_like(params[head]["conv"]["kernel"])
    for block in ("block", "prior_block", "posterior_block"):
        params[block]["conv_1"] = jax.tree.map(jnp.zeros_like, params[block]["conv_1"])
    mu, log_sigma, feature = np.split(np.asarray(params["prior"]["conv"]["bias"]), [2, 4])
    m, log_s = np.split(np.asarray(params["posterior"]["conv"]["bias"]), 2)
    matrix, bias = np.asarray(params["latents"]["kernel"])[0, 0], np.asarray(params["latents"]["bias"])

    def expected(noise):
        return np.asarray(y) + feature + (mu + np.exp(log_sigma) * noise) @ matrix + bias

    got, means, log_stds = level.apply({"params": params}, y, read, eps)
    np.testing.assert_allclose(got, expected(m + np.exp(log_s) * np.asarray(eps)), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(means, np.broadcast_to(m, means.shape), rtol=1e-5)
    np.testing.assert_allclose(log_stds, np.broadcast_to(log_s, means.shape), rtol=1e-5)
    prior, none, no = level.apply({"params": params}, y, None, eps)
    np.testing.assert_allclose(prior, expected(np.asarray(eps)), rtol=1e-4, atol=1e-4)
    assert none is None
    assert no is None


@pytest.mark.parametrize("log_std", [-1000.0, 1000.0])
def test_no_scale_leaves_float32(log_std):
    """Of the prior and of the posterior; the KL divides by the square of one and multiplies by that of the other."""
    level = Level(2, jnp.float32)
    y, read, eps = normals(1, 2, 2, 8), normals(1, 2, 2, 8, seed=1), normals(1, 2, 2, 2, seed=2)
    params = filled(lambda key: level.init(key, y, read, eps))["params"]
    for head in ("prior", "posterior"):
        params[head]["conv"]["bias"][2:4] = log_std

    def total(params):
        y_, mean, log_s = level.apply({"params": params}, y, read, eps)
        return jnp.sum(y_) + jnp.sum(jnp.square(mean * jnp.exp(-log_s)) + jnp.exp(2.0 * log_s))

    for value in jax.tree.leaves(jax.jit(jax.value_and_grad(total))(params)):
        assert np.all(np.isfinite(value))
    flat = build(FLAT)
    params, (x, label, eps) = filled(flat.init), given(FLAT)
    params["posterior"]["bias"][5:] = log_std
    q = infer(FLAT)(params, x, label, eps)
    np.testing.assert_array_equal(q.log_std, np.clip(log_std, *LOG_STDS) * np.ones_like(q.log_std))
    assert np.all(np.isfinite(q.pixels))


# ------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("lader", "did you mean 'ladder'"),
        ("ladder(depth=3)", "no option 'depth'"),
        ("ladder(levels=(1,1))", "levels must be"),
        ("ladder(levels=(0,0,0))", "levels must be"),
        ("ladder(latents=0)", "latents must be at least 1"),
        ("flat(latents=0)", "latents must be at least 1"),
        ("flat(blocks=0)", "blocks must be at least 1"),
        ("flat(multipliers=(1,0.5))", "multipliers must be whole numbers"),
        ("flat(channels=9)", "channels times a multiplier = 9"),
        ("flat(multipliers=(1,1,1,1,1))", "halve the image 4 times, and 8 pixels cannot be"),
    ],
)
def test_impossible_networks_are_refused(text, says):
    with pytest.raises(UserError, match=f"family.network.*{says}"):
        build(text)
