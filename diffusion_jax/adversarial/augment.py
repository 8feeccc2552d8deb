"""Changes of images that a discriminator looks through, so that it cannot learn a small data set by heart.

    D(T(x)) and D(T(G(z)))       T is drawn anew for each image, and differentiable: gradients reach G through it

Both kinds of images are changed, so the generator need not make changed ones: where T leaves a part of the images as
they are, two sets of images are alike if they are alike through T (Karras et al. 2020, "Training generative adversarial
networks with limited data", section 2.2). `DiffAugment` is fixed. `ADA` has a probability p that follows the
discriminator: it rises while real images are recognised too surely, and falls while they are not.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from diffusion_jax import rng
from diffusion_jax.types import Array


class Control(NamedTuple):
    """p f32[], and since it last moved: the sum of sign D(T(x)) over real images, and their number, f32[] each."""

    p: Array
    signs: Array
    images: Array

    @property
    def overfitting(self) -> Array:
        """r_t = E sign D(T(x)) over real images (Karras et al. 2020, eq. 1); 0 before there are any.

        D stands for the loss's `margin`, which is the logit where 0 is the border between real and generated.
        """
        return self.signs / jnp.maximum(self.images, 1.0)


class Augmentation(Protocol):
    """A row of `AUGMENTATIONS`; `start` is the probability that it begins with."""

    start: float

    def __call__(self, images: Array, keys: Array, p: Array) -> Array:
        """Images f32[n,H,W,C], each change with probability p f32[], drawn by keys key[n]. p = 0 changes nothing."""
        ...

    def adapt(self, control: Control, step: Array) -> Control:
        """What p becomes before `step` i32[]."""
        ...


def begin(augmentation: Augmentation) -> Control:
    """The control before the first step."""
    return Control(p=jnp.float32(augmentation.start), signs=jnp.float32(0.0), images=jnp.float32(0.0))


def observe(control: Control, margin: Array) -> Control:
    """Count margins f32[n] of real images in."""
    return control._replace(signs=control.signs + jnp.sum(jnp.sign(margin)), images=control.images + len(margin))


Change = Callable[[Array, Array], Array]
"""(image f32[H,W,C], key) -> the same, changed."""


def sometimes(change: Change, image: Array, key: Array, p: Array) -> Array:
    """The image, changed with probability p."""
    whether, how = jax.random.split(key)
    return jnp.where(jax.random.bernoulli(whether, p), change(image, how), image)


# ---------------------------------------------------------------------------------------------- DiffAugment


@dataclass(frozen=True, kw_only=True)
class DiffAugment:
    """Brightness, saturation, contrast; shifts; a square cut out (Zhao et al. 2020, section 4).

    What is shifted in or cut out is 0, as published.

    Attributes:
      policy: of "color", "translation" and "cutout", joined by commas.
      start: the probability of each change; the paper's is 1.
    """

    policy: str = "color,translation,cutout"
    start: float = 1.0

    def __post_init__(self) -> None:
        _check_probability("start", self.start)
        for name in self.policy.split(","):
            if name not in POLICIES:
                raise ValueError(f"policy must be of {', '.join(POLICIES)}, joined by commas, not {self.policy!r}")

    def __call__(self, images: Array, keys: Array, p: Array) -> Array:
        """See `Augmentation`."""

        def one(image: Array, key: Array) -> Array:
            changes = [change for name in self.policy.split(",") for change in POLICIES[name]]
            for i, change in enumerate(changes):
                image = sometimes(change, image, jax.random.fold_in(key, i), p)
            return image

        return jax.vmap(one)(images, keys)

    def adapt(self, control: Control, step: Array) -> Control:
        """p stays."""
        return begin(self)


def brightness(image: Array, key: Array) -> Array:
    """x + b, b uniform in [-1/2, 1/2)."""
    return image + jax.random.uniform(key, minval=-0.5, maxval=0.5)


def saturation(image: Array, key: Array) -> Array:
    """The differences between a pixel's channels times s, uniform in [0, 2)."""
    mean = jnp.mean(image, axis=-1, keepdims=True)
    return (image - mean) * jax.random.uniform(key, maxval=2.0) + mean


def contrast(image: Array, key: Array) -> Array:
    """The differences from the image's mean times c, uniform in [1/2, 3/2)."""
    mean = jnp.mean(image)
    return (image - mean) * jax.random.uniform(key, minval=0.5, maxval=1.5) + mean


def translation(image: Array, key: Array) -> Array:
    """Shifted by up to an eighth of each side, rounded to whole pixels; 0 comes in."""
    most = jnp.array([_rounded(size / 8) for size in image.shape[:2]])
    shift = jax.random.randint(key, (2,), -most, most + 1)
    inside = [_between(jnp.arange(size) - by, 0, size) for size, by in zip(image.shape[:2], shift, strict=True)]
    return jnp.where((inside[0][:, None] & inside[1][None])[..., None], shifted(image, shift), 0.0)


def cutout(image: Array, key: Array) -> Array:
    """A rectangle of half of each side, rounded up, is 0; its centre is anywhere in the image."""
    half = [_rounded(size / 2) for size in image.shape[:2]]
    last = jnp.array([size + 1 - cut % 2 for size, cut in zip(image.shape[:2], half, strict=True)])
    start = jax.random.randint(key, (2,), 0, last) - jnp.array(half) // 2
    rows, columns = (
        _between(jnp.arange(size), first, first + cut)
        for size, first, cut in zip(image.shape[:2], start, half, strict=True)
    )
    return jnp.where((rows[:, None] & columns[None])[..., None], 0.0, image)


def _rounded(size: float) -> int:
    """To the nearest whole number, halves up, as the published code has it."""
    return int(size + 0.5)


POLICIES = {"color": (brightness, saturation, contrast), "translation": (translation,), "cutout": (cutout,)}


# ---------------------------------------------------------------------------------------------- ADA


@dataclass(frozen=True, kw_only=True)
class ADA:
    """Adaptive discriminator augmentation (Karras et al. 2020, section 3 and appendix B).

    Blitting, geometry and colour of the paper's pipeline, which it found best together. Of its parts these differ: an
    image is read between its pixels bilinearly, without the wavelet filter that the paper uses against aliasing, and a
    single channel has no hue and no saturation.

    Attributes:
      blit: mirror, turn by quarters, shift by whole pixels.
      geometry: scale, turn, stretch, shift by fractions.
      color: brightness, contrast, inverted luma, hue (three channels), saturation.
      target: of r_t = E sign D(T(x)) over real images: above it p rises, below it p falls.
      images: real images seen while p goes from 0 to 1, at the fastest.
      every: steps between two moves of p.
      start: p at the beginning.
    """

    blit: bool = True
    geometry: bool = True
    color: bool = True
    target: float = 0.6
    images: int = 500_000
    every: int = 4
    start: float = 0.0

    def __post_init__(self) -> None:
        _check_probability("start", self.start)
        if not -1.0 < self.target < 1.0:
            raise ValueError(f"target must lie in (-1, 1), not {self.target}")
        if min(self.images, self.every) < 1:
            raise ValueError("images and every must be at least 1")
        if not (self.blit or self.geometry or self.color):
            raise ValueError("one of blit, geometry and color must be True")

    def __call__(self, images: Array, keys: Array, p: Array) -> Array:
        """See `Augmentation`."""
        groups = ((blitted, self.blit), (warped, self.geometry), (recoloured, self.color))
        for i, (group, wanted) in enumerate(groups):
            if wanted:
                images = jax.vmap(group, in_axes=(0, 0, None))(images, rng.fold(keys, i), p)
        return images

    def adapt(self, control: Control, step: Array) -> Control:
        """In each `every`-th step: p moves by (images since) / `images`, up where r_t is above `target`, else down."""
        towards = jnp.sign(control.overfitting - self.target) * control.images / self.images
        moved = Control(p=jnp.clip(control.p + towards, 0.0, 1.0), signs=jnp.float32(0.0), images=jnp.float32(0.0))
        return jax.tree.map(lambda a, b: jnp.where(step % self.every == 0, a, b), moved, control)


def blitted(image: Array, key: Array, p: Array) -> Array:
    """Mirrored, turned by quarters, shifted by up to an eighth in whole pixels: each drawn with probability p.

    What is drawn may be to leave it: mirrored in half of the cases, turned in three quarters.
    """
    keys = jax.random.split(key, 3)
    image = sometimes(lambda x, k: jnp.where(jax.random.bernoulli(k), x[:, ::-1], x), image, keys[0], p)
    image = sometimes(lambda x, k: turned(x, jax.random.randint(k, (), 0, 4)), image, keys[1], p)
    return sometimes(lambda x, k: shifted(x, _whole_shift(x, k)), image, keys[2], p)


def _whole_shift(image: Array, key: Array) -> Array:
    sides = jnp.array(image.shape[:2], jnp.float32)
    return jnp.round(jax.random.uniform(key, (2,), minval=-0.125, maxval=0.125) * sides).astype(jnp.int32)


def turned(image: Array, quarters: Array) -> Array:
    """A square image f32[H,H,C], turned counterclockwise by `quarters` i32[] in 0..3 times 90 degrees."""
    return jnp.stack([jnp.rot90(image, k) for k in range(4)])[quarters]


def shifted(image: Array, shift: Array) -> Array:
    """The image f32[H,W,C] moved down and right by `shift` i32[2] pixels, mirrored at its outer pixels."""
    H, W, _ = image.shape
    rows, columns = _mirrored(jnp.arange(H) - shift[0], H), _mirrored(jnp.arange(W) - shift[1], W)
    return image[rows][:, columns]


def warped(image: Array, key: Array, p: Array) -> Array:
    """Scaled, turned, stretched, turned again, shifted, each with probability p, in one reading of the image.

    With coordinates from the centre, S scaling and R(a) turning by a,

        source = S(1/s) R(a) S(1/q, q) R(b) (target - shift),   log2 s, log2 q ~ N(0, 0.2^2), shift ~ N(0, (side/8)^2)

    a and b are uniform, each with probability 1 - sqrt(1 - p): then an image is turned with probability p.
    """
    gates, normals, angles = jax.random.split(key, 3)
    turning = 1.0 - jnp.sqrt(1.0 - p)
    happens = jax.random.bernoulli(gates, jnp.stack([p, p, p, turning, turning])).astype(jnp.float32)
    log_s, log_q, down, right = jax.random.normal(normals, (4,))
    a, b = jax.random.uniform(angles, (2,), minval=-jnp.pi, maxval=jnp.pi) * happens[3:]
    s, q = jnp.exp2(0.2 * log_s * happens[0]), jnp.exp2(0.2 * log_q * happens[1])
    shift = jnp.stack([down, right]) * jnp.array(image.shape[:2], jnp.float32) / 8.0 * happens[2]
    to_source = turn(a) @ jnp.diag(jnp.stack([1.0 / q, q])) @ turn(b) / s
    return jnp.where(jnp.any(happens > 0.0), resampled(image, to_source, shift), image)


def turn(angle: Array) -> Array:
    """R(angle) f32[2,2], of (down, right)."""
    c, s = jnp.cos(angle), jnp.sin(angle)
    return jnp.stack([jnp.stack([c, -s]), jnp.stack([s, c])])


def resampled(image: Array, to_source: Array, shift: Array) -> Array:
    """The image f32[H,W,C] read at to_source (target - shift), f32[2,2] and f32[2] of (down, right) from its centre.

    Bilinear, mirrored at its outer pixels.
    """
    H, W, _ = image.shape
    centre = jnp.array([(H - 1) / 2.0, (W - 1) / 2.0])[:, None, None]
    target = jnp.mgrid[:H, :W].astype(jnp.float32) - centre - shift[:, None, None]
    source = jnp.einsum("ij,jhw->ihw", to_source, target, precision="highest") + centre
    first = jnp.floor(source)
    part = (source - first)[..., None]
    rows = [_mirrored(first[0].astype(jnp.int32) + i, H) for i in (0, 1)]
    columns = [_mirrored(first[1].astype(jnp.int32) + i, W) for i in (0, 1)]
    above, below = (image[r, columns[0]] * (1.0 - part[1]) + image[r, columns[1]] * part[1] for r in rows)
    return above * (1.0 - part[0]) + below * part[0]


def recoloured(image: Array, key: Array, p: Array) -> Array:
    """Brightness, contrast, inverted luma, hue, saturation: each with probability p.

    v is the grey axis, the unit vector with all channels alike, and v v^T x the luma of a pixel x.
    """
    C = image.shape[-1]
    luma = jnp.full((C, C), 1.0 / C)
    colour = jnp.eye(C) - luma
    changes = [
        lambda x, k: x + 0.2 * jax.random.normal(k),
        lambda x, k: x * jnp.exp2(0.5 * jax.random.normal(k)),
        lambda x, k: jnp.where(jax.random.bernoulli(k), x - 2.0 * _mixed(x, luma), x),
    ]
    if C == 3:
        changes.append(lambda x, k: _mixed(x, hue(jax.random.uniform(k, minval=-jnp.pi, maxval=jnp.pi))))
    if C > 1:
        changes.append(lambda x, k: _mixed(x, luma + colour * jnp.exp2(jax.random.normal(k))))
    for i, change in enumerate(changes):
        image = sometimes(change, image, jax.random.fold_in(key, i), p)
    return image


def hue(angle: Array) -> Array:
    """The rotation f32[3,3] about the grey axis v: v v^T + cos (1 - v v^T) + sin [v]_x (Rodrigues' formula)."""
    luma = jnp.full((3, 3), 1.0 / 3.0)
    cross = jnp.array([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / jnp.sqrt(3.0)
    return luma + jnp.cos(angle) * (jnp.eye(3) - luma) + jnp.sin(angle) * cross


def _mixed(image: Array, matrix: Array) -> Array:
    """Each pixel x as `matrix` x."""
    return jnp.einsum("ij,hwj->hwi", matrix, image, precision="highest")


AUGMENTATIONS = {"diffaugment": DiffAugment, "ada": ADA}


# ---------------------------------------------------------------------------------------------- what both share


def _mirrored(index: Array, size: int) -> Array:
    """A pixel in [0, size) for any place i32 on a row of mirror images that share their outer pixels."""
    period = 2 * (size - 1)
    return jnp.abs((index + size - 1) % period - (size - 1))


def _between(index: Array, first: Array | int, end: Array | int) -> Array:
    return (index >= first) & (index < end)


def _check_probability(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must lie in [0, 1], not {value}")
