"""Edits that only diffusion has: `diffusion.editing`, bound to a model's weights and sampling options.

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


def _walk(model: Any, weights: Weights, inputs: Inputs, options: Tree) -> Walk:
    return model.walk(weights, {"label": inputs["label"]} if "label" in inputs else {}, options)


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


EDITS = {"img2img": img2img, "inpaint": inpaint}
