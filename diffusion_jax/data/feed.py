"""How batches reach the compiled step. The loop sees two methods and does not know which feed it has.

`chunk(step, count)` puts what the next `count` steps need on the device; `batch(chunk, i)` is traced inside the step
and takes the i-th batch out of it. Small data sets live on the device and a chunk is a table of indices; large ones
stream through grain and a chunk is the images themselves.
"""

from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from diffusion_jax import tree
from diffusion_jax.data import order
from diffusion_jax.data.source import Source, to_arrays
from diffusion_jax.types import Array, Batch, Tree


class Feed(Protocol):
    """The interface.

    Attributes:
      capacity: the most batches that one chunk holds.
    """

    capacity: int

    def chunk(self, step: int, count: int) -> Tree:
        """On the device: what steps `step` .. `step` + `count` - 1 need, `count` at most `capacity`."""
        ...

    def batch(self, chunk: Tree, i: Array) -> Batch:
        """Traced: the batch of step number i of the chunk, without augmentation."""
        ...


@dataclass(frozen=True, kw_only=True)
class ResidentFeed:
    """The whole data set on every device, gathered inside the compiled step.

    Attributes:
      columns: `image` [N,H,W,C] (or what else the source has) and, with classes, `label` i32[N]; replicated.
      batch_size: examples a step.
      seed: of the order.
      rows: sharding of a batch's first axis.
      capacity: batches a chunk.
    """

    columns: dict[str, Array]
    batch_size: int
    seed: int
    rows: NamedSharding
    capacity: int

    def chunk(self, step: int, count: int) -> Tree:
        """The arrays, and i32[capacity, B] of indices into them."""
        start, size = step * self.batch_size, len(next(iter(self.columns.values())))
        index = order.examples(self.seed, start, self.capacity * self.batch_size, size)
        index = index.reshape(self.capacity, self.batch_size)
        sharding = NamedSharding(self.rows.mesh, P(None, *self.rows.spec))
        return self.columns | {"index": tree.place(index, sharding)}

    def batch(self, chunk: Tree, i: Array) -> Batch:
        """Gather one batch."""
        chosen = chunk["index"][i]
        columns = {key: chunk[key][chosen] for key in self.columns}
        return jax.lax.with_sharding_constraint(columns, self.rows) | {"index": positions(self.batch_size)}


def positions(batch_size: int) -> Array:
    """`batch["index"]`: the place of each example in its batch."""
    return jnp.arange(batch_size, dtype=jnp.int32)


def resident(source: Source, batch_size: int, seed: int, rows: NamedSharding, capacity: int) -> ResidentFeed:
    """Put a data set on the devices of `rows.mesh`."""
    everywhere = NamedSharding(rows.mesh, P())
    return ResidentFeed(
        columns={name: tree.place(column, everywhere) for name, column in to_arrays(source).columns().items()},
        batch_size=batch_size,
        seed=seed,
        rows=rows,
        capacity=capacity,
    )
