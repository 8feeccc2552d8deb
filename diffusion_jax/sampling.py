"""The one way to sample: the same image for the same (seed, index), whatever else is asked for beside it.

Images are made in batches of one fixed size by one compiled program; a last, short batch is padded and cut.
"""

from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from diffusion_jax import rng, tree
from diffusion_jax.data.source import to_uint8
from diffusion_jax.training.sharding import BATCH, batch_ways
from diffusion_jax.types import Array, Condition, Family, ImageSpec, Tree, Weights


class Sampler:
    """Compiles a family's `generate` once and draws any number of images with it.

    Args:
      family: what generates.
      spec: what the images look like.
      mesh: the devices; a batch is cut over them.
      batch_size: images at once, rounded up to what the mesh can share evenly.
    """

    def __init__(self, family: Family, spec: ImageSpec, mesh: Mesh, batch_size: int) -> None:
        ways = batch_ways(mesh)
        self.spec, self.batch_size = spec, -(-batch_size // ways) * ways
        self.rows = NamedSharding(mesh, BATCH)

        def generate(weights: Weights, seed: Array, index: Array, condition: Condition, options: Tree) -> Array:
            keys = rng.example_keys(rng.stream(jax.random.key(seed), "sample"), index)
            return family.generate(weights, keys, condition, options)

        self.program = jax.jit(generate)

    def labels(self, count: int, label: int | None = None) -> np.ndarray | None:
        """i32[count]: all `label`, or the classes in turn (label i = i mod classes); None for data without classes."""
        if not self.spec.num_classes:
            return None
        return (
            np.full(count, label, np.int32)
            if label is not None
            else np.arange(count, dtype=np.int32) % self.spec.num_classes
        )

    def draw(self, weights: Weights, seed: int, labels: np.ndarray | None, count: int, options: Tree) -> np.ndarray:
        """Images uint8 [count,H,W,C], on the data's own grey levels."""
        return np.concatenate(list(self.batches(weights, seed, labels, count, options)))[:count]

    def batches(
        self, weights: Weights, seed: int, labels: np.ndarray | None, count: int, options: Tree
    ) -> Iterator[np.ndarray]:
        """Batches of `draw`, each fetched while the next one is computed."""
        running = None
        for start in range(0, count, self.batch_size):
            index = np.arange(start, start + self.batch_size, dtype=np.int32)
            condition = {} if labels is None else {"label": self.put(labels[np.minimum(index, count - 1)])}
            images = self.program(weights, np.uint32(seed), self.put(index), condition, options)
            if running is not None:
                yield to_uint8(jax.device_get(running), self.spec.levels)
            running = images
        yield to_uint8(jax.device_get(running), self.spec.levels)

    def put(self, array: np.ndarray) -> Array:
        """Cut an array's first axis over the devices."""
        return tree.place(array, self.rows)
