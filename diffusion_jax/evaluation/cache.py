"""Fitted features on disk, in the user's cache directory, by a hash of all that they depend on."""

import hashlib
import io
import logging
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from diffusion_jax import files, tree
from diffusion_jax.types import Tree

_BROKEN = (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error)


def digest(images: np.ndarray, labels: np.ndarray | None, recipe: object) -> str:
    """Sixteen hexadecimal digits from images u8[N,H,W,C], labels i32[N] or None and the text form of `recipe`."""
    state = hashlib.sha256(repr((images.shape, labels is None, recipe)).encode())
    state.update(np.ascontiguousarray(images).data)
    if labels is not None:
        state.update(np.ascontiguousarray(labels, np.int32).data)
    return state.hexdigest()[:16]


def path(name: str) -> Path:
    """Where the features with the digest `name` are kept."""
    return files.cache_directory() / "features" / f"{name}.npz"


def fetch(name: str, abstract: Tree, fit: Callable[[], Tree]) -> Tree:
    """The arrays kept under `name`, or `fit()`, which is kept from now on.

    A file that can't be read, or doesn't hold arrays of the shapes of `abstract`, is replaced. A cache directory that
    can't be written to costs the cache, not the evaluation.
    """
    file = path(name)
    try:
        return _load(file, abstract)
    except FileNotFoundError:
        logging.info("Fitting the features of the evaluation, once; they are kept in %s.", file)
    except _BROKEN as error:
        logging.warning("%s is damaged (%s) and is made again.", file, error)
    arrays = fit()
    try:
        _save(file, arrays)
    except OSError as error:
        logging.warning("The features can't be kept: %s.", error)
    return arrays


def _load(file: Path, abstract: Tree) -> Tree:
    def leaf(key: tuple, like: jax.ShapeDtypeStruct) -> np.ndarray:
        array = stored[tree.path_name(key)]
        if array.shape != like.shape or array.dtype != like.dtype:
            raise ValueError(f"{tree.path_name(key)} has shape {array.shape}")
        return array

    with file.open("rb") as stream, np.load(stream) as stored:
        return jax.tree.map_with_path(leaf, abstract)


def _save(file: Path, arrays: Tree) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **{tree.path_name(key): leaf for key, leaf in jax.tree.leaves_with_path(arrays)})
    files.write_whole(file, buffer.getvalue())
