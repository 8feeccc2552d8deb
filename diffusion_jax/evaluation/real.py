"""Real images for evaluation: a fair choice of them, on the grey levels that every image is judged on."""

import numpy as np

from diffusion_jax.data.source import ArraySource, Source, to_arrays, to_float, to_uint8
from diffusion_jax.types import ImageSpec


def quantise(images: np.ndarray, spec: ImageSpec) -> np.ndarray:
    """u8[N,H,W,C] on the grey levels of `spec`, from u8 or f32 in [-1,1]: the same way for real and for made images."""
    if images.dtype == np.uint8 and spec.levels == 256:
        return images
    return to_uint8(to_float(images), spec.levels)


def choose(source: Source, limit: int) -> ArraySource:
    """`limit` images of `source` (all, where it has no more), drawn with a fixed seed: folders are sorted by class."""
    if len(source) <= limit:
        return to_arrays(source)
    index = np.sort(np.random.default_rng(0).choice(len(source), limit, replace=False))
    if isinstance(source, ArraySource):
        return ArraySource(image=source.image[index], label=None if source.label is None else source.label[index])
    examples = [source[int(i)] for i in index]
    label = np.array([example["label"] for example in examples], np.int32) if "label" in examples[0] else None
    return ArraySource(image=np.stack([example["image"] for example in examples]), label=label)
