"""Pytrees seen as tables of paths: names of leaves, sizes, finiteness, a hash."""

import hashlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.types import Array, Tree


def path_name(path: tuple) -> str:
    """`params/denoiser/block_0/qkv/kernel` from a key path of jax."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def count(tree: Tree) -> int:
    """Number of scalars in the tree (works on abstract trees)."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def fingerprint(tree: Tree, function: object = None) -> str:
    """Sixteen hexadecimal digits from the bits of the arrays, leaf after leaf, and the text form of what reads them."""
    state = hashlib.sha256(b"" if function is None else repr(function).encode())
    for leaf in jax.tree.leaves(tree):
        state.update(np.ascontiguousarray(leaf).data)
    return state.hexdigest()[:16]


def all_finite(tree: Tree) -> Array:
    """bool[]: no leaf holds an infinity or a NaN."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def norm(tree: Tree) -> Array:
    """f32[]: the Euclidean norm of all leaves together."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)))


def where(condition: Array, yes: Tree, no: Tree) -> Tree:
    """`yes` where `condition` (bool[]) holds, `no` elsewhere, leaf by leaf."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


def place(array: np.ndarray, sharding: jax.sharding.Sharding) -> Array:
    """Put a host array, the same in every process, on the devices of `sharding`."""
    return place_parts(array.shape, sharding, array.__getitem__)


def place_parts(shape: tuple[int, ...], sharding: jax.sharding.Sharding, part: Callable[[tuple], np.ndarray]) -> Array:
    """Put an array of `shape` on the devices of `sharding`, of which `part(slices)` gives this process's pieces.

    The one place where the host's data may enter while the loop's transfer guard stands.
    """
    with jax.transfer_guard("allow"):
        return jax.make_array_from_callback(shape, sharding, part)
