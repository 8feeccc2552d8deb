"""U-ViT: where its tokens go."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import networks
from diffusion_jax.types import ImageSpec

SPEC = ImageSpec(size=8, channels=3, num_classes=5)


pytestmark = pytest.mark.usefixtures("quick_compilation")


@functools.cache
def network(options=""):
    net = networks.build("family.network", f"uvit(width=32,depth=4,heads=2{options})", SPEC)
    generator = np.random.default_rng(0)
    shapes = jax.eval_shape(net.init, jax.random.key(0))
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.2 * generator.normal(size=leaf.shape), leaf.dtype), shapes
    ), net.apply


def inputs(label):
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    return x, jnp.array([0.2, 0.7]), jnp.full((2,), label)


def silenced(params, *names):
    """With branches that add nothing, and skips that hand on what comes from below."""
    blocks = ("in_0", "in_1", "middle", "out_0", "out_1")
    still = {
        name: params[name] | {out: jax.tree.map(jnp.zeros_like, params[name][out]) for out in names} for name in blocks
    }
    return params | still


def test_skips_join_mirror_images():
    """The last out-block sees what the first in-block returned: with it alone let through, all between is bypassed."""
    params, apply = network()
    upper = jnp.concatenate([jnp.zeros((32, 32)), jnp.eye(32)])
    only_skip = params | {"skip_1": {"kernel": upper, "bias": jnp.zeros((32,))}}
    changed = only_skip | {name: jax.tree.map(lambda p: p + 0.1, params[name]) for name in ("in_1", "middle", "out_0")}
    given = inputs(1)
    np.testing.assert_allclose(apply(changed, *given), apply(only_skip, *given), atol=1e-5)
    for name in ("in_0", "out_1"):
        seen = only_skip | {name: jax.tree.map(lambda p: p + 0.1, params[name])}
        assert not np.allclose(apply(seen, *given), apply(only_skip, *given), atol=1e-3)


def test_time_and_label_are_tokens():
    """Where no token sees another, the image hears of neither time nor label."""
    params, apply = network()
    silent = silenced(params, "attention_out")
    plain = apply(silent, *inputs(1))
    x, t, label = inputs(2)
    np.testing.assert_array_equal(apply(silent, x, t + 0.1, label), plain)
    assert not np.allclose(apply(params, *inputs(2)), apply(params, *inputs(1)), atol=1e-3)


def test_no_label_without_a_row_is_a_token_of_zeros():
    params, apply = network(",null_label=False")
    assert params["label"].shape == (5, 32)
    none = apply(params, *inputs(5))
    zeros = apply(params | {"label": params["label"].at[3].set(0.0)}, *inputs(3))
    np.testing.assert_array_equal(none, zeros)
    assert not np.allclose(none, apply(params, *inputs(4)), atol=1e-3)


@pytest.mark.parametrize("option", ["", ",convolution=False"])
def test_the_convolution_alone_crosses_seams(option):
    """Where no token sees another, a pixel reaches its patch, and the convolution's neighbours of it."""
    params, apply = network(option)
    params = silenced(params, "attention_out")
    x, t, label = inputs(1)
    moved = np.asarray(apply(params, x.at[:, 3, 3].add(1.0), t, label) - apply(params, x, t, label))
    rows, columns = np.nonzero(np.abs(moved).max((0, 3)))
    reached = {2, 3} if option else {1, 2, 3, 4}
    assert set(rows) == set(columns) == reached
