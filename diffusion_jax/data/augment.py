"""Changes of training images, inside the compiled step, one draw an example.

`flip` leaves what an image shows as it is. What `AUGMENTATIONS` do would show in the samples; so they leave a label of
what they have done, `augment`, on which the network is conditioned, and sampling asks for zeros: nothing done.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from diffusion_jax import rng
from diffusion_jax.data.source import to_float
from diffusion_jax.types import Array, Batch


def flip(batch: Batch, key: Array) -> Batch:
    """Mirror each image left to right with probability 1/2.

    Args:
      batch: `image` [B,H,W,C] of any type, `index` i32[B], whatever else.
      key: of this step.
    """
    keys = rng.example_keys(key, batch["index"])
    mirrored = rng.draw(keys, lambda key: jax.random.bernoulli(key))
    image = batch["image"]
    return {**batch, "image": jnp.where(mirrored[:, None, None, None], image[:, :, ::-1], image)}


class Augmentation(Protocol):
    """A row of `AUGMENTATIONS`; `width` is that of its label."""

    width: int

    def __call__(self, batch: Batch, key: Array) -> Batch:
        """Change `image` [B,H,W,C] by the key of this step, and add `augment` f32[B,width]."""
        ...


@dataclass(frozen=True, kw_only=True)
class EDMAugmentation:
    """Karras et al. 2022, appendix F.2: mirrored, scaled, rotated, stretched, shifted; `transform` says how.

    Attributes:
      probability: of each change but the first; 0.12 for CIFAR-10, 0.15 for FFHQ and AFHQv2.
    """

    probability: float = 0.12
    width: ClassVar[int] = 9

    def __post_init__(self) -> None:
        if not 0.0 <= self.probability <= 1.0:
            raise ValueError(f"probability must lie in [0, 1], not {self.probability}")

    def __call__(self, batch: Batch, key: Array) -> Batch:
        """See `Augmentation`."""
        keys = rng.example_keys(rng.stream(key, "edm"), batch["index"])
        image, label = transform(to_float(batch["image"]), keys, self.probability)
        return {**batch, "image": image, "augment": label}


AUGMENTATIONS: dict[str, Callable[..., Augmentation]] = {"edm": EDMAugmentation}


# ---------------------------------------------------------------------------------------------- EDM's, step by step


class Change(NamedTuple):
    """What happens to one image, all 0 for nothing: f32[] each. x points right and y down.

    Attributes:
      mirror_x: 1 to mirror left to right.
      mirror_y: 1 to mirror top to bottom.
      scale: w, for a size 2^(0.2 w) times as large.
      angle: of a rotation, in [-pi, pi), counterclockwise.
      stretch: w, for 2^(0.2 w) times as long along an axis and as much shorter across it.
      axis: angle of that axis, in [-pi, pi).
      shift_x: to the right, over an eighth of the width.
      shift_y: downwards, over an eighth of the height.
    """

    mirror_x: Array
    mirror_y: Array
    scale: Array
    angle: Array
    stretch: Array
    axis: Array
    shift_x: Array
    shift_y: Array


def transform(images: Array, keys: Array, probability: float) -> tuple[Array, Array]:
    """Augment each image by its own key.

    Args:
      images: f32[B,H,W,C] in [-1, 1]; H and W are at least 2.
      keys: key[B].
      probability: in [0, 1].

    Returns:
      Images f32[B,H,W,C] in [-1, 1] and labels f32[B,9]. Where the label is zero, the image is as it was, to the bit.
    """
    changes = rng.draw(keys, partial(draw, probability=probability))
    return jax.vmap(apply)(images, changes), jax.vmap(label_of)(changes)


def draw(key: Array, probability: float) -> Change:
    """What happens to an image: each change with `probability`, upside down in half of those cases.

    Left and right are exchanged in half of all images, unless `probability` is 0.
    """
    gates, normals, angles = jax.random.split(key, 3)
    p = probability
    rates = jnp.array([jnp.where(p > 0.0, 0.5, 0.0), 0.5 * p, p, p, p, p, 0.5])
    happens = jax.random.bernoulli(gates, rates).astype(jnp.float32)
    mirror_x, mirror_y, scaled, turned, stretched, shifted, slanted = happens
    scale, stretch, shift_x, shift_y = jax.random.normal(normals, (4,))
    angle, axis = jax.random.uniform(angles, (2,), minval=-jnp.pi, maxval=jnp.pi)
    return Change(
        mirror_x=mirror_x,
        mirror_y=mirror_y,
        scale=scaled * scale,
        angle=turned * angle,
        stretch=stretched * stretch,
        axis=slanted * axis,
        shift_x=shifted * shift_x,
        shift_y=shifted * shift_y,
    )


def label_of(change: Change) -> Array:
    """Mirrors, scale, (cos - 1, sin) of the angle, stretch (cos, sin) of its axis, shifts: f32[9], in EDM's order."""
    c = change
    turned = (jnp.cos(c.angle) - 1.0, jnp.sin(c.angle))
    stretched = (c.stretch * jnp.cos(c.axis), c.stretch * jnp.sin(c.axis))
    return jnp.stack([c.mirror_x, c.mirror_y, c.scale, *turned, *stretched, c.shift_x, c.shift_y])


def apply(image: Array, change: Change) -> Array:
    """Image f32[H,W,C] -> the same, changed."""
    image = jnp.where(change.mirror_x > 0.0, image[:, ::-1], image)
    image = jnp.where(change.mirror_y > 0.0, image[::-1], image)
    moved = (change.scale != 0.0) | (change.angle != 0.0) | (change.stretch != 0.0)
    moved = moved | (change.shift_x != 0.0) | (change.shift_y != 0.0)
    return jnp.where(moved, resample(image, *sources(change, *image.shape[:2])), image)


def sources(change: Change, height: int, width: int) -> tuple[Array, Array]:
    """Where each pixel of the changed image comes from: (x, y), f32[H,W] each.

    With coordinates from the centre, S scaling, R(a) turning by a:

        source = S(1/s) R(angle) R(-axis) S(1/q, q) R(axis) (target - shift),   s = 2^(0.2 scale), q = 2^(0.2 stretch)
    """
    centre_x, centre_y = (width - 1) / 2.0, (height - 1) / 2.0
    y, x = jnp.mgrid[:height, :width].astype(jnp.float32)
    x = x - centre_x - change.shift_x * width / 8.0
    y = y - centre_y - change.shift_y * height / 8.0
    x, y = _turned(x, y, change.axis)
    q = jnp.exp2(0.2 * change.stretch)
    x, y = _turned(x / q, y * q, change.angle - change.axis)
    s = jnp.exp2(0.2 * change.scale)
    return x / s + centre_x, y / s + centre_y


def _turned(x: Array, y: Array, angle: Array) -> tuple[Array, Array]:
    c, s = jnp.cos(angle), jnp.sin(angle)
    return c * x - s * y, s * x + c * y


def resample(image: Array, x: Array, y: Array) -> Array:
    """The image f32[H,W,C] in [-1, 1] at the places (x, y) f32[H',W'], between its pixels: f32[H',W',C] in [-1, 1].

    Bicubic (Keys 1981, a = -1/2), with the image mirrored at its outer pixels. The published pipeline doubles the image
    by a wavelet's filter, interpolates bilinearly and halves it again.
    """
    left, top = jnp.floor(x), jnp.floor(y)
    total = jnp.zeros((*x.shape, image.shape[-1]))
    for row in range(-1, 3):
        for column in range(-1, 3):
            weight = _cubic(top + row - y) * _cubic(left + column - x)
            pixel = image[_mirrored(top + row, image.shape[0]), _mirrored(left + column, image.shape[1])]
            total = total + weight[..., None] * pixel
    return jnp.clip(total, -1.0, 1.0)


def _cubic(distance: Array) -> Array:
    """Weight of a sample at `distance` in [-2, 2]: 1 at 0, and 0 at every other whole number."""
    d = jnp.abs(distance)
    return jnp.where(d < 1.0, (1.5 * d - 2.5) * d * d + 1.0, ((2.5 - 0.5 * d) * d - 4.0) * d + 2.0)


def _mirrored(index: Array, size: int) -> Array:
    """A pixel in [0, size) for any place on a row of mirror images that share their outer pixels: i32."""
    period = 2 * (size - 1)
    return jnp.abs((index.astype(jnp.int32) + size - 1) % period - (size - 1))
