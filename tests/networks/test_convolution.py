"""The convolution's derivatives against jax's own, and in the order of axes that CPUs are fast in."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.networks.convolution import convolve

SHAPES = [
    # size, kernel, stride, padding, dilation of the image
    (8, 3, 1, None, 1),
    (8, 3, 2, None, 1),
    (8, 3, 2, 1, 1),
    (7, 3, 2, 1, 1),
    (9, 5, 3, 0, 1),
    (6, 1, 1, None, 1),
    (8, 4, 2, 1, 1),
    (5, 4, 1, 2, 2),
]


def theirs(x, kernel, stride, padding, dilation=1):
    pads = "SAME" if padding is None else [(padding, padding)] * 2
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), pads, (dilation, dilation), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def arrays(size, width):
    generator = np.random.default_rng(0)
    x, kernel = generator.normal(size=(2, size, size + 2, 3)), generator.normal(size=(width, width, 3, 4))
    return jnp.float32(x), jnp.float32(kernel)


def first(conv, *options):
    """Gradients of a function of the outputs that is not linear in them."""
    return jax.grad(lambda x, k: jnp.sum(jnp.sin(conv(x, k, *options))), argnums=(0, 1))


def second(conv, *options):
    """Gradients of what R1 is made of, |gradient towards x|^2."""
    return jax.grad(lambda x, k: jnp.sum(jnp.square(first(conv, *options)(x, k)[0])), argnums=(0, 1))


@pytest.mark.parametrize("case", SHAPES)
def test_values_and_derivatives_are_those_of_jax(case):
    size, width, *options = case
    given = arrays(size, width)
    for derivative in (lambda conv, *options: lambda x, k: (conv(x, k, *options),), first, second):
        mine, expected = (jax.jit(derivative(conv, *options))(*given) for conv in (convolve, theirs))
        for a, b in zip(mine, expected, strict=True):
            assert a.shape == b.shape
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())


@pytest.mark.parametrize(("derivative", "stride"), [(first, 1), (first, 2), (second, 1)])
def test_inside_of_a_loop_all_are_in_one_order_of_axes(derivative, stride):
    """`b01f_01io->b01f` is what XLA's CPU compiler has fast code for; jax's own gradients are in others.

    (Of second derivatives with a stride it turns one back again.)
    """

    def labels(conv):
        step = lambda _, given: derivative(conv, stride, None)(*given)
        loop = jax.jit(lambda n, *given: jax.lax.fori_loop(0, n, step, given))
        return set(re.findall(r"dim_labels=(\S+?),? ", loop.lower(3, *arrays(8, 3)).compile().as_text()))

    assert labels(convolve) == {"b01f_01io->b01f"}
    assert labels(theirs) != {"b01f_01io->b01f"}
