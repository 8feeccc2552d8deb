"""Random keys as pure functions of (seed, stream name, step, example index): there is no generator state to lose.

Whatever is drawn for an example depends on that example's own key, so neither the number of devices, nor the batch an
example is put into, nor an interruption changes it.
"""

import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffusion_jax.types import Array


def stream(key: Array | int, name: str, step: Array | int | None = None) -> Array:
    """The key of the stream `name`, at `step` if given. `key` is a key or the run's integer seed."""
    if not isinstance(key, jax.Array):
        key = jax.random.key(key)
    key = jax.random.fold_in(key, zlib.crc32(name.encode()))
    return key if step is None else jax.random.fold_in(key, step)


def example_keys(key: Array, index: Array) -> Array:
    """One key an example: key[B] from one key and i32[B]."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, index)


def sample_keys(seed: Array, index: Array) -> Array:
    """The keys key[n] of the images `index` i32[n] that are sampled with `seed` u32[]."""
    return example_keys(stream(jax.random.key(seed), "sample"), index)


def fold(keys: Array, data: Array | int) -> Array:
    """Fold one number into each of key[B]."""
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, data)


def normal(keys: Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> Array:
    """Standard normals of `shape` for each of key[B]: [B, *shape]."""
    return jax.vmap(lambda key: jax.random.normal(key, shape, dtype))(keys)


def uniform(keys: Array, dtype: jnp.dtype = jnp.float32) -> Array:
    """One uniform number in [0, 1) for each of key[B]: [B]."""
    return jax.vmap(lambda key: jax.random.uniform(key, (), dtype))(keys)


def draw(keys: Array, sample: Callable[[Array], Array]) -> Array:
    """`sample(key)` for each of key[B]: [B, ...]."""
    return jax.vmap(sample)(keys)
