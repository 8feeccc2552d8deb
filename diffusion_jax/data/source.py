"""One interface to images: random access by index, and what they look like."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from diffusion_jax.types import ImageSpec


class Source(Protocol):
    """Images by index. `source[i]` is {"image": u8[H,W,C] or f32[H,W,C] in [-1,1]} and, with classes, "label": int.

    One that a tokenizer has read has "encoded" in the place of "image": see `data.encoded`.
    """

    def __len__(self) -> int:
        """Number of images."""
        ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The image (and label) of `index` in [0, len)."""
        ...


@dataclass(frozen=True, kw_only=True)
class ArraySource:
    """Images that are in memory: `image` [N,H,W,C], `label` i32[N] or None."""

    image: np.ndarray
    label: np.ndarray | None

    def __len__(self) -> int:
        """Number of images."""
        return len(self.image)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The image (and label) of `index`."""
        example = {"image": self.image[index]}
        return example if self.label is None else example | {"label": int(self.label[index])}

    def columns(self) -> dict[str, np.ndarray]:
        """All of it by name."""
        return {"image": self.image} | ({} if self.label is None else {"label": self.label})


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A data set: what its images look like, those to train on, and those that only evaluation may touch."""

    name: str
    spec: ImageSpec
    train: Source
    held_out: Source


@dataclass(frozen=True, kw_only=True)
class Unlabelled:
    """The images of `source`, without their labels."""

    source: Source

    def __len__(self) -> int:
        """Number of images."""
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The image of `index`."""
        return {"image": self.source[index]["image"]}

    @property
    def identity(self) -> Any:
        """What tells the images from others, where the source says (see `data.encoded`)."""
        return getattr(self.source, "identity", None)


def unlabelled(dataset: Dataset) -> Dataset:
    """The same images without labels, of a data set without classes."""

    def without(source: Source) -> Source:
        return replace(source, label=None) if isinstance(source, ArraySource) else Unlabelled(source=source)

    spec = replace(dataset.spec, num_classes=0)
    return replace(dataset, spec=spec, train=without(dataset.train), held_out=without(dataset.held_out))


def to_arrays(source: Source) -> ArraySource:
    """All images of `source` in memory; images on disk are decoded by threads."""
    if hasattr(source, "columns"):  # it is in memory already
        return source
    count, first = len(source), source[0]
    image = np.empty((count, *first["image"].shape), first["image"].dtype)
    label = np.empty(count, np.int32) if "label" in first else None

    def read(i: int) -> None:
        example = source[i]
        image[i] = example["image"]
        if label is not None:
            label[i] = example["label"]

    with ThreadPoolExecutor() as pool:
        for _ in pool.map(read, range(count)):  # iterating raises what a thread raised
            pass
    return ArraySource(image=image, label=label)


def example_bytes(source: Source) -> int:
    """Bytes of the first image of `source`, or of what it is encoded as: that of every one."""
    first = source[0]
    return first["image" if "image" in first else "encoded"].nbytes


def to_float(image: np.ndarray) -> np.ndarray:
    """f32 in [-1, 1] from u8 in 0..255; float images pass as they are."""
    return image.astype(np.float32) / 127.5 - 1.0 if image.dtype == np.uint8 else image


def to_uint8(image: np.ndarray, levels: int = 256) -> np.ndarray:
    """uint8 0..255 from f32 in [-1, 1], rounded to the nearest of the data's `levels` equidistant grey levels."""
    unit = np.clip((np.asarray(image, np.float64) + 1.0) / 2.0, 0.0, 1.0)
    return np.rint(np.rint(unit * (levels - 1)) * (255.0 / (levels - 1))).astype(np.uint8)
