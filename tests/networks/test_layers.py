"""Layers that are written for speed compute what the plain formulas say, in every direction of differentiation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.networks import attention, layers


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (3, 7, 6), (3, 6)])
def test_spread_is_a_broadcast_forwards_and_backwards(rows, shape):
    """Whole numbers: sums are exact in whatever order."""
    draw = lambda seed, shape: jax.random.randint(jax.random.key(seed), shape, -9, 9).astype(jnp.float32)
    vectors, tangent, weights = draw(0, (rows, 6)), draw(1, (rows, 6)), draw(2, shape)
    plain = lambda v: np.broadcast_to(np.asarray(v).reshape(rows, *(1,) * (len(shape) - 2), 6), shape)

    y, moved = jax.jit(lambda v, t: jax.jvp(lambda v: layers.spread(v, shape), (v,), (t,)))(vectors, tangent)
    np.testing.assert_array_equal(y, plain(vectors))
    np.testing.assert_array_equal(moved, plain(tangent))

    gradient = jax.jit(jax.grad(lambda v: jnp.sum(weights * layers.spread(v, shape))))(vectors)
    over = tuple(range(1, len(shape) - 1)) if rows > 1 else tuple(range(len(shape) - 1))
    np.testing.assert_array_equal(gradient, np.sum(weights, over).reshape(rows, 6))


def test_the_gradient_of_a_bias_is_a_product_on_cpus():
    """No loop over a batch's pixels, which XLA would join with all that is computed before it."""
    shape = (16, 8, 8, 32)
    gradient = jax.jit(jax.grad(lambda v, x: jnp.sum(jnp.sin(x + layers.spread(v, shape)))))
    text = gradient.lower(jnp.zeros((1, 32)), jnp.zeros(shape)).compile().as_text()
    assert " dot(" in text
    assert " reduce(" not in text


@pytest.mark.parametrize("channels", [32, 48])
def test_group_norm_is_what_it_says(channels):
    """Every group of an example has mean 0 and variance 1 before the affine, to which no other example adds."""
    x = 3.0 + 2.0 * jax.random.normal(jax.random.key(0), (2, 4, 4, channels))
    norm = layers.GroupNorm(groups=8)
    scale, bias = np.linspace(0.5, 2.0, channels), np.linspace(-1.0, 1.0, channels)
    params = {"scale": jnp.float32(scale), "bias": jnp.float32(bias)}
    y = jax.jit(norm.apply)({"params": params}, x)

    groups = np.asarray(x, np.float64).reshape(2, 16, 8, channels // 8)
    mean, variance = groups.mean((1, 3), keepdims=True), groups.var((1, 3), keepdims=True)
    expected = ((groups - mean) / np.sqrt(variance + 1e-6)).reshape(x.shape) * scale + bias
    np.testing.assert_allclose(y, expected, atol=2e-6)


@pytest.mark.parametrize("width", [1, 6, 7, 256, 257])
def test_largest_is_the_maximum(width):
    x = jax.random.normal(jax.random.key(0), (3, 5, width))
    np.testing.assert_array_equal(attention.largest(x), np.max(x, -1, keepdims=True))
