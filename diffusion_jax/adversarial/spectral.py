"""Spectral normalisation (Miyato et al. 2018): kernels of spectral norm 1, for any network, outside of the network.

    W / sigma(W),   sigma(W) = max |W b| / |b| = a W b,   with unit vectors a ~ W b and b ~ W^T a     (eq. 7 and 8)

Every leaf named `kernel` is one matrix W: all its axes but the last are inputs. `vectors` holds b for each, by the
kernel's path. While W changes slowly, one round of W b -> a, W^T a -> b a step keeps up with it (algorithm 1). Averaged
weights have no vectors of their own: `exactly` computes sigma from the weights alone.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffusion_jax import rng, tree
from diffusion_jax.types import Array, Tree

Vectors = dict[str, Array]


def begin(params: Tree, key: Array) -> Vectors:
    """Random unit vectors f32[outputs] to start from."""
    return {
        name: _unit(jax.random.normal(rng.stream(key, name), (kernel.shape[-1],)))
        for name, kernel in _kernels(params).items()
    }


def advance(params: Tree, vectors: Vectors) -> Vectors:
    """One round of power iteration for each kernel."""
    return {name: _round(kernel, vectors[name])[1] for name, kernel in _kernels(params).items()}


def normalise(params: Tree, vectors: Vectors) -> Tree:
    """The parameters with kernels W / (a W b), where a and b are constants to a derivative (eq. 10 to 12)."""

    def sigma(name: str, kernel: Array) -> Array:
        a, b = jax.lax.stop_gradient(_round(kernel, vectors[name]))
        return a @ _matrix(kernel) @ b

    return _divided(params, sigma)


def exactly(params: Tree) -> Tree:
    """The parameters with kernels over their largest singular value."""
    return _divided(params, lambda name, kernel: jnp.linalg.norm(_matrix(kernel), 2))


def _divided(params: Tree, sigma: Callable[[str, Array], Array]) -> Tree:
    """Kernels over `sigma(path, kernel)`; one that is all zeros stays so."""

    def divide(path: tuple, leaf: Array) -> Array:
        if not _is_kernel(path):
            return leaf
        s = sigma(tree.path_name(path), leaf)
        return leaf / jnp.where(s > 0.0, s, 1.0)

    return jax.tree_util.tree_map_with_path(divide, params)


def _kernels(params: Tree) -> dict[str, Array]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {tree.path_name(path): leaf for path, leaf in leaves if _is_kernel(path)}


def _is_kernel(path: tuple) -> bool:
    return path[-1] == jax.tree_util.DictKey("kernel")


def _matrix(kernel: Array) -> Array:
    """[..., outputs] -> [inputs, outputs]."""
    return kernel.reshape(-1, kernel.shape[-1])


def _round(kernel: Array, b: Array) -> tuple[Array, Array]:
    """(a, b) after W b -> a, W^T a -> b."""
    a = _unit(_matrix(kernel) @ b)
    return a, _unit(a @ _matrix(kernel))


def _unit(v: Array) -> Array:
    """v / |v|, and v itself where that is 0."""
    norm = jnp.linalg.norm(v)
    return v / jnp.where(norm > 0.0, norm, 1.0)
