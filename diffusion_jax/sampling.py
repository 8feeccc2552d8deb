"""The one way to sample: the same image for the same (seed, index), whatever else is asked for beside it.

Images are made in batches of one fixed size by one compiled program; a last, short batch is padded and cut.
"""

from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from diffusion_jax import rng, tree
from diffusion_jax.data.source import to_uint8
from diffusion_jax.training.sharding import BATCH, batch_ways
from diffusion_jax.types import Array, ImageSpec, Tree, Weights

Rows = Mapping[str, np.ndarray]
"""What each image is made from, by name: arrays with one row an image, and scalars that are the same for all."""

Act = Callable[[Weights, Array, Mapping[str, Array], Tree], Array]
"""(weights, keys key[n], rows, options) -> f32[n,...], such as a family's `generate` or one of its edits."""


class Sampler:
    """Compiles `act` once and makes any number of images with it.

    Args:
      act: what makes images.
      spec: what the images look like.
      mesh: the devices; a batch is cut over them.
      batch_size: images at once, rounded up to what the mesh can share evenly.
    """

    def __init__(self, act: Act, spec: ImageSpec, mesh: Mesh, batch_size: int) -> None:
        ways = batch_ways(mesh)
        self.spec, self.batch_size = spec, -(-batch_size // ways) * ways
        self.rows = NamedSharding(mesh, BATCH)

        def make(weights: Weights, seed: Array, index: Array, rows: Mapping[str, Array], options: Tree) -> Array:
            return act(weights, rng.sample_keys(seed, index), rows, options)

        self.program = jax.jit(make)

    def labels(self, count: int, label: int | None = None) -> Rows:
        """`label` i32[count]: all `label`, or the classes in turn (i mod classes); nothing for data without classes."""
        if not self.spec.num_classes:
            return {}
        turn = np.arange(count, dtype=np.int32) % self.spec.num_classes
        return {"label": turn if label is None else np.full(count, label, np.int32)}

    def draw(self, weights: Weights, seed: int, rows: Rows, count: int, options: Tree) -> np.ndarray:
        """Images uint8 [count,H,W,C], on the data's own grey levels."""
        return np.concatenate(list(self.images(weights, seed, rows, count, options)))

    def images(self, weights: Weights, seed: int, rows: Rows, count: int, options: Tree) -> Iterator[np.ndarray]:
        """The images of `draw`, uint8 [n,H,W,C] a batch: for more of them than memory should hold."""
        for batch in self.batches(weights, seed, rows, count, options):
            yield to_uint8(batch, self.spec.levels)

    def batches(self, weights: Weights, seed: int, rows: Rows, count: int, options: Tree) -> Iterator[np.ndarray]:
        """What `act` returns for images 0 .. count - 1, each batch handed out while the next one is computed."""
        running = None
        for start in range(0, count, self.batch_size):
            index = np.arange(start, start + self.batch_size, dtype=np.int32)
            own = np.minimum(index, count - 1)
            placed = {name: self.put(array[own]) if array.ndim else array for name, array in rows.items()}
            made = self.program(weights, np.uint32(seed), self.put(index), placed, options)
            if running is not None:
                yield jax.device_get(running)
            running = made
        yield jax.device_get(running)[: count - start]

    def put(self, array: np.ndarray) -> Array:
        """Cut an array's first axis over the devices."""
        return tree.place(array, self.rows)
