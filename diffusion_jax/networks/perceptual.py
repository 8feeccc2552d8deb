"""Feature maps by which two images are compared: those of VGG16, and those of the classifier that judges samples.

Each is a function (params, x f32[B,H,W,C] in [-1,1]) -> maps f32[B,h,w,c], from fine to coarse.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_jax.networks.classifier import Classifier, stage_widths
from diffusion_jax.networks.convolution import convolve
from diffusion_jax.networks.layers import Conv
from diffusion_jax.types import Array, Tree

VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Channels of the 3x3 convolutions of each block; between two blocks stands 2x2 max pooling (Simonyan & Zisserman 2015,
Table 1, column D)."""

LEAST = 2 ** (len(VGG16) - 1)
"""Pixels that an image needs a side, so that one is left."""

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""By which images in [-1, 1] become what VGG16 was trained on (richzhang/PerceptualSimilarity)."""


def vgg16(params: Tree, x: Array) -> list[Array]:
    """Maps behind the last rectifier of each block. Grey images are shown in three equal channels.

    Args:
      params: one list a block, one {"kernel" f32[3,3,c,c'], "bias" f32[c']} a convolution.
      x: f32[B,H,W,1 or 3] in [-1,1], H and W at least `LEAST`.
    """
    along = lambda values: jnp.asarray(values, x.dtype)[None, None, None]
    x, maps = (x - along(SHIFT)) / along(SCALE), []
    for i, block in enumerate(params):
        x = nn.max_pool(x, (2, 2), (2, 2)) if i else x
        for layer in block:
            x = nn.relu(convolve(x, layer["kernel"], padding=1) + layer["bias"][None, None, None])
        maps.append(x)
    return maps


def classifier(params: Tree, x: Array) -> list[Array]:
    """Maps behind each convolution of the classifier whose parameters are `params`: see `build_classifier`."""
    hidden = {name: params[name]["kernel"].shape[-1] for name in ("Dense_0", "Dense_1")}
    model = Classifier(hidden["Dense_1"], stage_widths(x.shape[1]), hidden["Dense_0"])
    convolutions = lambda module, method: isinstance(module, Conv)
    seen = model.apply({"params": params}, x, capture_intermediates=convolutions, mutable=["intermediates"])[1]
    return [nn.relu(outputs["__call__"][0]) for _, outputs in sorted(seen["intermediates"].items())]


def distance(maps: list[Array], others: list[Array], weights: list[Array]) -> Array:
    """LPIPS (Zhang et al. 2018, eq. 1) of two images by their maps: f32[B].

        d = sum_l 1 / (H_l W_l) sum_hw sum_c w_lc (y_hwc / |y_hw| - y'_hwc / |y'_hw|)^2

    Args:
      maps: y_l f32[B,H_l,W_l,c_l].
      others: y'_l, likewise.
      weights: w_l f32[c_l], not negative.
    """
    apart = [jnp.square(_unit(y) - _unit(other)) for y, other in zip(maps, others, strict=True)]
    weighted = [jnp.sum(squares * w[None, None, None], axis=-1) for squares, w in zip(apart, weights, strict=True)]
    return sum(jnp.mean(part, axis=(1, 2)) for part in weighted)


def _unit(y: Array) -> Array:
    """y / |y| along the channels; 0, and without a gradient, where |y| is next to 0."""
    square = jnp.sum(jnp.square(y), axis=-1, keepdims=True)
    known = square > 1e-20
    return jnp.where(known, y * jax.lax.rsqrt(jnp.where(known, square, 1.0)), 0.0)
