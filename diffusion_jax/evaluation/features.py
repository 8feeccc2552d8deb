"""The space in which images are compared: the last hidden layer of a small classifier, trained here on training images.

It never sees a held-out image, nor one that a model made. Everything in its training is fixed, so the same data gives
the same features; they are cached by a hash of all that goes in. Data without labels: principal components.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np

from diffusion_jax import tree
from diffusion_jax.data.source import ArraySource, Dataset
from diffusion_jax.evaluation import cache, extractors
from diffusion_jax.evaluation.real import choose, quantise
from diffusion_jax.types import Array, ImageSpec, Tree

MAX_IMAGES = 50_000
_BLOCK = 256  # images that go through the extractor at once


@dataclass(frozen=True, kw_only=True, eq=False)
class Features:
    """A feature extractor.

    Attributes:
      name: of the extractor, with its number of features.
      digest: hash of the training images, their labels, the architecture and the recipe.
      fingerprint: hash of the fitted weights. Another version of jax, or another device, rounds otherwise and so fits
        others from the same recipe: only figures with the same fingerprint compare directly; ratios to the floor do.
      spec: what the images look like.
      weights: what `forward` needs.
      forward: jitted (weights, u8[256,H,W,C]) -> features f32[256,D], logits f32[256,num_classes] or None.
    """

    name: str
    digest: str
    fingerprint: str
    spec: ImageSpec
    weights: Tree
    forward: Callable[[Tree, Array], tuple[Array, Array | None]]

    def about(self) -> dict[str, str]:
        """What names this extractor in a report."""
        return {"name": self.name, "hash": self.digest, "fingerprint": self.fingerprint}

    def describe(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Features f64[N,D] and predicted labels i32[N] (None where the data has none) of u8 or f32 images [N,H,W,C].

        N is at least 1. Images are rounded to the data's grey levels first, and go through in blocks of one size, so
        that it compiles once.
        """
        images = quantise(images, self.spec)
        features, labels = [], []
        for start in range(0, len(images), _BLOCK):
            block = images[start : start + _BLOCK]
            padding = np.zeros((_BLOCK - len(block), *block.shape[1:]), np.uint8)
            padded = jax.device_put(np.concatenate([block, padding]))
            feature, logits = jax.device_get(self.forward(self.weights, padded))
            features.append(feature[: len(block)])
            labels.append(None if logits is None else np.argmax(logits[: len(block)], 1).astype(np.int32))
        return np.concatenate(features).astype(np.float64), None if labels[0] is None else np.concatenate(labels)

    def extract(self, images: np.ndarray) -> np.ndarray:
        """Features f64[N,D] of u8 or f32 images [N,H,W,C], N at least 1."""
        return self.describe(images)[0]

    def predict(self, images: np.ndarray) -> np.ndarray | None:
        """Labels i32[N] of u8 or f32 images [N,H,W,C], N at least 1; None where the data has no labels."""
        return self.describe(images)[1]


def build(dataset: Dataset) -> Features:
    """The extractor for `dataset`: from the cache, or trained now on (at most 50,000 of) its training images."""
    spec = dataset.spec
    labelled = spec.num_classes > 1
    train = choose(dataset.train, MAX_IMAGES if labelled else extractors.COMPONENT_IMAGES)
    images = quantise(train.image, spec)
    labels = train.label if labelled else None
    if labels is None:
        extractor = extractors.principal_components(images)
    else:
        extractor = extractors.classifier(ArraySource(image=images, label=labels), spec)
    digest = cache.digest(images, labels, (spec.num_classes, spec.levels, extractor.recipe))
    weights = cache.fetch(digest, extractor.weights, extractor.fit)

    @jax.jit
    def forward(weights: Tree, images: Array) -> tuple[Array, Array | None]:
        with jax.default_matmul_precision("highest"):  # else a TPU's features differ from a CPU's in the third digit
            return extractor.apply(weights, images)

    return Features(
        name=extractor.name,
        digest=digest,
        fingerprint=tree.fingerprint(weights),
        spec=spec,
        weights=jax.device_put(weights),
        forward=forward,
    )
