"""The convolution, with derivatives that are fast wherever they stand.

    y[b, i, o] = sum_jc  x[b, s i + j - p, c] k[j, c, o]          stride s, p zeros before; i, j over both axes

Its derivatives are convolutions of other arrays: towards x of y' with the kernel turned around, towards k of x with y'.
XLA's CPU compiler has fast code for one order of axes alone. It brings others into that order where they stand in a
program's outermost computation, and not inside of loops and branches; there a gradient of jax's own takes forty times
as long (docs/performance.md). So on CPUs they are written in that order here, and so are their own derivatives.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from diffusion_jax.types import Array

CONVOLVED = "convolved"
"""By which `remat` knows what a convolution returned."""


class Geometry(NamedTuple):
    """How a kernel lies on an image, for both axes alike but for the padding, which is ((before, after), ...)."""

    stride: int
    padding: tuple[tuple[int, int], tuple[int, int]]
    image_dilation: int = 1
    kernel_dilation: int = 1


def convolve(x: Array, kernel: Array, stride: int = 1, padding: int | None = None, image_dilation: int = 1) -> Array:
    """Convolve x [B,H,W,C] with kernel [h,w,C,O]: [B,H/stride,W/stride,O].

    `padding` is that of each side in pixels; None pads as little as H/stride needs, below and to the right first.
    `image_dilation` puts that many pixels less one, all 0, between two of x's before. On CPUs there is no forward-mode
    derivative.
    """
    if padding is None:
        pads = jax.lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], (stride, stride), "SAME")
    else:
        pads = [(padding, padding)] * 2
    geometry = Geometry(stride, tuple(map(tuple, pads)), image_dilation)
    y = (_in_order if jax.default_backend() == "cpu" else _plain)(x, kernel, geometry)
    return checkpoint_name(y, CONVOLVED)


def _plain(x: Array, kernel: Array, g: Geometry) -> Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(g.stride,) * 2,
        padding=g.padding,
        lhs_dilation=(g.image_dilation,) * 2,
        rhs_dilation=(g.kernel_dilation,) * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _in_order(x: Array, kernel: Array, g: Geometry) -> Array:
    return _plain(x, kernel, g)


def _forward(x: Array, kernel: Array, g: Geometry) -> tuple[Array, tuple[Array, Array]]:
    return _in_order(x, kernel, g), (x, kernel)


def _backward(g: Geometry, saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    """Both derivatives as convolutions: what was a stride spreads y' out, and the padding makes the sizes fit."""
    x, kernel = saved
    sizes = [
        [(n - 1) * dilation + 1 for n in shape]
        for shape, dilation in (
            (x.shape[1:3], g.image_dilation),
            (kernel.shape[:2], g.kernel_dilation),
            (dy.shape[1:3], g.stride),
        )
    ]
    towards_x, towards_kernel = [], []
    for (before, _), n, k, m in zip(g.padding, *sizes, strict=True):
        first = k - before - 1
        towards_x.append((first, n + k - 1 - m - first))
        towards_kernel.append((before, m - n + first))
    turned = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
    dx = _in_order(dy, turned, Geometry(g.image_dilation, tuple(towards_x), g.stride, g.kernel_dilation))
    examples_last = x.transpose(3, 1, 2, 0)
    of_kernel = Geometry(g.kernel_dilation, tuple(towards_kernel), g.image_dilation, g.stride)
    dk = _in_order(examples_last, dy.transpose(1, 2, 0, 3), of_kernel)
    return dx, dk.transpose(1, 2, 0, 3)


_in_order.defvjp(_forward, _backward)
