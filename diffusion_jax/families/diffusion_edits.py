"""Edits with a trained diffusion model: `diffusion.editing`, bound to a model's weights and sampling options.

Each edit maps (model, weights, keys, inputs, options) to images f32[n,H,W,C] in [-1, 1]. `inputs` are arrays with one
row an image (or scalars): what each edit reads stands in its docstring.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from diffusion_jax import rng
from diffusion_jax.diffusion import editing
from diffusion_jax.diffusion.editing import Walk
from diffusion_jax.types import Array, Tree, Weights

Inputs = Mapping[str, Array]


def _walk(model: Any, weights: Weights, inputs: Inputs, options: Tree, label: str = "label") -> Walk:
    return model.walk(weights, {"label": inputs[label]} if label in inputs else {}, options)


def _noise(model: Any, keys: Array, options: Tree) -> Array:
    """Other noise than `generate` draws by the same keys: with that, a sample would come back as it was."""
    return model.noise(rng.fold(keys, 2), options)


def img2img(model: Any, weights: Weights, keys: Array, inputs: Inputs, options: Tree) -> Array:
    """Noise `image` to the time `strength` f32[] and walk down from there, under `label`."""
    walk = _walk(model, weights, inputs, options)
    return jnp.clip(
        editing.vary(walk, inputs["image"], inputs["strength"], _noise(model, keys, options), rng.fold(keys, 1)),
        -1.0,
        1.0,
    )


def inpaint(model: Any, weights: Weights, keys: Array, inputs: Inputs, options: Tree) -> Array:
    """Make the pixels of `image` that are not `known` bool[n,H,W,1], under `label`, each step `resamplings` times."""
    walk = _walk(model, weights, inputs, options)
    made = editing.inpaint(
        walk, inputs["image"], inputs["known"], _noise(model, keys, options), rng.fold(keys, 1), inputs["resamplings"]
    )
    return jnp.clip(made, -1.0, 1.0)


def translate(model: Any, weights: Weights, keys: Array, inputs: Inputs, options: Tree) -> Array:
    """Encode `image` under `source_label`, decode it under `label`."""
    source = _walk(model, weights, inputs, options, "source_label")
    target = _walk(model, weights, inputs, options)
    return jnp.clip(editing.translate(source, target, inputs["image"], keys), -1.0, 1.0)


def interpolate_images(model: Any, weights: Weights, keys: Array, inputs: Inputs, options: Tree) -> Array:
    """Between the images `first` and `second`, at `share` f32[n] of the way, under `label`."""
    walk = _walk(model, weights, inputs, options)
    made = editing.interpolate(walk, inputs["first"], inputs["second"], inputs["share"], keys)
    return jnp.clip(made, -1.0, 1.0)


def interpolate_seeds(model: Any, weights: Weights, keys: Array, inputs: Inputs, options: Tree) -> Array:
    """Between image 0 of the seeds `first` and `second` u32[], at `share` f32[n] of the way, under `label`."""
    walk, zero = _walk(model, weights, inputs, options), jnp.zeros(len(keys), jnp.int32)
    ends = (model.noise(rng.sample_keys(inputs[name], zero), options) for name in ("first", "second"))
    return jnp.clip(editing.decode(walk, editing.slerp(*ends, inputs["share"]), keys), -1.0, 1.0)


EDITS = {
    "img2img": img2img,
    "inpaint": inpaint,
    "translate": translate,
    "interpolate_images": interpolate_images,
    "interpolate_seeds": interpolate_seeds,
}
