"""Images as a frozen tokenizer has read them: kept in the user's cache, so that training reads each image once.

A file is named by a hash of the images (and whatever was done to them before), and of the tokenizer. It is whole or not
there: it is written beside its place and moved there at the end.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_jax import files
from diffusion_jax.data.source import ArraySource, Source, to_float

_BLOCK = 1024  # images that are in memory at once
_PROBES = 256  # images on disk that are looked at to tell one data set from another

Encode = Callable[[np.ndarray], np.ndarray]
"""Images f32[n,H,W,C] in [-1, 1] -> what the tokenizer makes of them, [n,...]."""


@dataclass(frozen=True, kw_only=True)
class EncodedSource:
    """A source whose examples have `encoded` in the place of `image`.

    Attributes:
      encoded: [N,...], possibly a file that is mapped into memory.
      label: i32[N] or None.
    """

    encoded: np.ndarray
    label: np.ndarray | None

    def __len__(self) -> int:
        """Number of images."""
        return len(self.encoded)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """What image `index` is encoded as (and its label)."""
        example = {"encoded": np.array(self.encoded[index])}
        return example if self.label is None else example | {"label": int(self.label[index])}

    def columns(self) -> dict[str, np.ndarray]:
        """All of it by name."""
        return {"encoded": np.asarray(self.encoded)} | ({} if self.label is None else {"label": self.label})

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation f64[channels] over all examples and places."""
        width = self.encoded.shape[-1]
        blocks = lambda: (
            np.asarray(self.encoded[i : i + _BLOCK], np.float64).reshape(-1, width) for i in range(0, len(self), _BLOCK)
        )
        mean = sum(block.sum(0) for block in blocks()) / (self.encoded.size / width)
        return mean, np.sqrt(sum(np.square(block - mean).sum(0) for block in blocks()) / (self.encoded.size / width))


def fetch(source: Source, about: object, encode: Encode) -> EncodedSource:
    """All of `source` as `encode` has it: from the cache, or made now and kept there.

    Args:
      source: images and labels.
      about: what the images are and which tokenizer reads them; its text form is part of the file's name.
      encode: run on blocks of images where the cache has nothing, or a file that cannot be read.

    A cache that cannot be written to costs the cache, not the run.
    """
    file = files.cache_directory() / "encoded" / f"{digest(source, about)}.npy"
    try:
        label = source.label if isinstance(source, ArraySource) else np.load(file.with_suffix(".label.npy"))
        label = label if label is None or len(label) else None
        encoded = np.load(file, mmap_mode="r")
        if len(encoded) != len(source):
            raise ValueError(f"it has {len(encoded)} rows for {len(source)} images")
        return EncodedSource(encoded=encoded, label=label)
    except FileNotFoundError:
        logging.info("The tokenizer reads all images, once; what it makes of them is kept in %s.", file)
    except (OSError, ValueError, EOFError) as error:
        logging.warning("%s is damaged (%s) and is made again.", file, error)
    label = _labels(source)
    try:
        if not isinstance(source, ArraySource):
            with files.whole(file.with_suffix(".label.npy")) as stream:  # first: where there are codes, it is there
                np.save(stream, np.zeros(0, np.int32) if label is None else label)
        return EncodedSource(encoded=_written(file, source, encode), label=label)
    except OSError as error:
        logging.warning("What the tokenizer makes of the images can't be kept: %s.", error)
        return EncodedSource(encoded=np.concatenate(list(_encoded(source, encode))), label=label)


def digest(source: Source, about: object) -> str:
    """Sixteen hexadecimal digits from `about`, the images and their labels.

    From all that are in memory; of those on disk from some, and from the source's `identity`, where it has one.
    """
    state = hashlib.sha256(repr((about, len(source), getattr(source, "identity", None))).encode())
    if isinstance(source, ArraySource):
        for column in source.columns().values():
            state.update(np.ascontiguousarray(column).data)
    else:
        for i in np.linspace(0, len(source) - 1, min(_PROBES, len(source))).astype(int):
            example = source[int(i)]
            state.update(np.ascontiguousarray(example["image"]).data)
            state.update(repr(example.get("label")).encode())
    return state.hexdigest()[:16]


def _written(file: Path, source: Source, encode: Encode) -> np.ndarray:
    with files.whole(file) as stream:
        for i, block in enumerate(_encoded(source, encode)):
            if i == 0:
                header = {"descr": np.lib.format.dtype_to_descr(block.dtype), "fortran_order": False}
                np.lib.format.write_array_header_1_0(stream, header | {"shape": (len(source), *block.shape[1:])})
            stream.write(np.ascontiguousarray(block).tobytes())
    return np.load(file, mmap_mode="r")


def _encoded(source: Source, encode: Encode) -> Iterator[np.ndarray]:
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(source), _BLOCK):
            examples = pool.map(source.__getitem__, range(start, min(start + _BLOCK, len(source))))
            yield encode(to_float(np.stack([example["image"] for example in examples])))


def _labels(source: Source) -> np.ndarray | None:
    if isinstance(source, ArraySource):
        return source.label
    if "label" not in source[0]:
        return None
    with ThreadPoolExecutor() as pool:
        return np.fromiter((e["label"] for e in pool.map(source.__getitem__, range(len(source)))), np.int32)
