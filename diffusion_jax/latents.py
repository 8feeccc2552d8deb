"""Walks among what a family's images are made from: there and back, between two images, along one dimension.

    reconstruct          decode(encode(image))
    translate            encode under one label, decode under another
    interpolate_images   encode two images, slerp between their latents, decode
    interpolate_seeds    the same between the latents that two seeds draw
    traverse             one dimension of a latent takes other values, all else stays, decode

Each walk maps (latent, weights, keys, inputs, options) to images f32[n,H,W,C] in [-1, 1]. `inputs` are arrays with one
row an image, or scalars: `label` i32[n] where the model has classes, and what the walk's docstring names.

What a family draws besides the latent (noise inputs, a sample of a posterior) must not change along a walk, or images
would differ by more than the walk. So those between two ends, and those along one dimension, do not ask for their own
`keys`: they share the keys that the ends have, from the seeds among `inputs`.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from diffusion_jax import rng
from diffusion_jax.errors import require
from diffusion_jax.types import Array, Condition, Family, Latent, Tree, Weights

Inputs = Mapping[str, Array]


def latent_of(family: Family, field: str, value: object, encodes: bool) -> Latent:
    """The family's latent, with an encoder where the walk `encodes` images.

    Raises:
      UserError: naming `field`, `value` and the family, where it has none.
    """
    latent = family.latent
    require(latent is not None, field, value, f"the family {family.name} has no latent to walk in")
    rule = f"the family {family.name} has no encoder, which leads from an image to its latent"
    require(latent.encode is not None or not encodes, field, value, rule)
    return latent


# ---------------------------------------------------------------------------------------------- there and back


def reconstruct(latent: Latent, weights: Weights, keys: Array, inputs: Inputs, options: Tree) -> Array:
    """Encode `image` f32[n,H,W,C] and decode it, under `label`."""
    z = encode(latent, weights, inputs["image"], keys, condition(inputs), options)
    return decode(latent, weights, z, keys, condition(inputs), options)


def translate(latent: Latent, weights: Weights, keys: Array, inputs: Inputs, options: Tree) -> Array:
    """Encode `image` f32[n,H,W,C] under `source_label` i32[n], decode it under `label` (Su et al. 2023)."""
    z = encode(latent, weights, inputs["image"], keys, condition(inputs, "source_label"), options)
    return decode(latent, weights, z, keys, condition(inputs), options)


def encode(latent: Latent, weights: Weights, image: Array, keys: Array, label: Condition, options: Tree) -> Array:
    """The latents f32[n,*shape] of images f32[n,H,W,C]."""
    return latent.encode(weights, image, rng.fold(keys, 0), label, options)


def decode(latent: Latent, weights: Weights, z: Array, keys: Array, label: Condition, options: Tree) -> Array:
    """The images of latents that `encode` made by the same keys: what it drew with them is not drawn again."""
    return latent.decode(weights, z, rng.fold(keys, 1), label, options)


def condition(inputs: Inputs, name: str = "label") -> Condition:
    """The label that stands in `inputs` by this name; nothing for a model without classes."""
    return {"label": inputs[name]} if name in inputs else {}


# ---------------------------------------------------------------------------------------------- between two ends


def slerp(first: Array, second: Array, share: Array) -> Array:
    """Between two latents f32[n,...] along the arc (Shoemake 1985): `first` at share 0, `second` at 1.

    With theta the angle between them: (sin((1 - share) theta) first + sin(share theta) second) / sin(theta). Latents of
    one norm keep it; on the straight line between them it would fall, and grey images follow. Where theta is next to 0
    the arc is the line. theta = pi has no arc, and gives the line, too.

    Args:
      first: f32[n,...], of any rank.
      second: as `first`.
      share: f32[] or f32[n], in [0, 1].
    """
    axes = tuple(range(1, first.ndim))
    dot = lambda a, b: jnp.sum(a * b, axis=axes, keepdims=True)
    lengths = jnp.maximum(dot(first, first) * dot(second, second), jnp.finfo(first.dtype).tiny)
    cosine = dot(first, second) * jax.lax.rsqrt(lengths)
    theta = jnp.arccos(jnp.clip(cosine, -1.0, 1.0))
    share = jnp.asarray(share, first.dtype).reshape(-1, *(1 for _ in axes))
    line = jnp.abs(jnp.sin(theta)) < jnp.sqrt(jnp.finfo(first.dtype).eps)
    arc = lambda u: jnp.sin(u * theta) / jnp.where(line, 1.0, jnp.sin(theta))
    weight = lambda u: jnp.where(line, u, arc(u))
    return weight(1.0 - share) * first + weight(share) * second


def interpolate_images(latent: Latent, weights: Weights, keys: Array, inputs: Inputs, options: Tree) -> Array:
    """Between the images `first` and `second` f32[n,H,W,C], at `share` f32[n] of the way, under `label`.

    Each is encoded under its own label, `first_label` and `second_label` i32[n]. Where `label` at either end is that
    end's, the ends are what `reconstruct` makes of images 0 and 1 by `seed` u32[].
    """
    ends = [keys_of(inputs["seed"], i, keys) for i in (0, 1)]
    of_ends = (
        encode(latent, weights, inputs[name], key, condition(inputs, f"{name}_label"), options)
        for name, key in zip(("first", "second"), ends, strict=True)
    )
    z = slerp(*of_ends, inputs["share"])
    return decode(latent, weights, z, nearer(*ends, inputs["share"]), condition(inputs), options)


def interpolate_seeds(latent: Latent, weights: Weights, keys: Array, inputs: Inputs, options: Tree) -> Array:
    """Between image 0 of the seeds `first` and `second` u32[], at `share` f32[n] of the way, under `label`.

    The ends are what `generate` makes.
    """
    ends = [keys_of(inputs[name], 0, keys) for name in ("first", "second")]
    z = slerp(*(latent.draw(end, options) for end in ends), inputs["share"])
    return latent.decode(weights, z, nearer(*ends, inputs["share"]), condition(inputs), options)


def keys_of(seed: Array, index: int, like: Array) -> Array:
    """The key of image `index` of `seed` u32[], as often as there are keys in `like`: key[n]."""
    return rng.sample_keys(seed, jnp.full(len(like), index, jnp.int32))


def nearer(first: Array, second: Array, share: Array) -> Array:
    """The key[n] of the end that is nearer at `share` f32[n], so that both ends are made as they are alone."""
    return jnp.where(share < 0.5, first, second)


# ---------------------------------------------------------------------------------------------- along one dimension


def traverse(latent: Latent, weights: Weights, keys: Array, inputs: Inputs, options: Tree) -> Array:
    """With `value` f32[n] in the place `dimension` i32[n] of the latent, flattened, and all else as it was.

    The latent is that of `image` f32[n,H,W,C] where the inputs have it, else the one that `generate` begins with. It
    stands for image `index` i32[n] of `seed` u32[], whose keys it has.
    """
    dimension, value, label = inputs["dimension"], inputs["value"], condition(inputs)
    shared = rng.sample_keys(inputs["seed"], inputs["index"])
    if "image" in inputs:
        z = encode(latent, weights, inputs["image"], shared, label, options)
        return decode(latent, weights, with_value(z, dimension, value), shared, label, options)
    z = latent.draw(shared, options)
    return latent.decode(weights, with_value(z, dimension, value), shared, label, options)


def with_value(z: Array, dimension: Array, value: Array) -> Array:
    """z f32[n,...] with `value` f32[n] at the index `dimension` i32[n] of each flattened row."""
    flat = z.reshape(len(z), -1)
    here = jnp.arange(flat.shape[1], dtype=dimension.dtype)[None] == dimension[:, None]
    return jnp.where(here, value.astype(z.dtype)[:, None], flat).reshape(z.shape)


WALKS = {
    "reconstruct": reconstruct,
    "translate": translate,
    "interpolate_images": interpolate_images,
    "interpolate_seeds": interpolate_seeds,
    "traverse": traverse,
}
