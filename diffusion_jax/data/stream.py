"""The feed for data sets that are too large for a device: images are read, a chunk ahead, by grain's threads.

The order is `data/order.py`'s, so a batch is the same as in the resident feed. What grain keeps is a read-ahead buffer
and nothing more: any step can be asked for at any time, and consecutive ones are merely faster.
"""

import grain
import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from diffusion_jax import tree
from diffusion_jax.data import order
from diffusion_jax.data.feed import positions
from diffusion_jax.data.source import Source, example_bytes
from diffusion_jax.types import Array, Batch, Tree

_SLAB = 32  # most examples that a thread reads at once: every hand-over from a thread costs the main one up to 5 ms


class _Slabs:
    """The rows of all batches that this process reads, one after another, cut into slabs of `size` examples."""

    def __init__(self, source: Source, batch_size: int, seed: int, columns: np.ndarray) -> None:
        self._source, self._batch_size, self._seed, self._columns = source, batch_size, seed, columns
        self.size = max(n for n in range(1, _SLAB + 1) if len(columns) % n == 0)

    def __len__(self) -> int:
        return 2**48  # endless; len() must fit a C integer

    def __getitem__(self, slab: int) -> dict[str, np.ndarray]:
        step, place = np.divmod(np.arange(slab * self.size, (slab + 1) * self.size), len(self._columns))
        wanted = step * self._batch_size + self._columns[place]
        examples = [self._source[int(i)] for i in order.at(self._seed, wanted, len(self._source))]
        return {key: np.stack([example[key] for example in examples]) for key in examples[0]}


class StreamFeed:
    """Chunks of images, read ahead in the background. Every process reads the rows of its own devices only.

    Attributes:
      capacity: batches a chunk.
    """

    def __init__(self, source: Source, batch_size: int, seed: int, rows: NamedSharding, capacity: int) -> None:
        first = source[0]
        self.capacity = capacity
        self._shapes = {key: np.shape(value) for key, value in first.items()}
        self._dtypes = {key: np.dtype(np.int32) if key == "label" else value.dtype for key, value in first.items()}
        self._batch_size = batch_size
        self._rows = rows
        self._columns = local_rows(rows, batch_size)
        self._slabs = _Slabs(source, batch_size, seed, self._columns)
        ahead = capacity * len(self._columns) // self._slabs.size
        options = grain.ReadOptions(num_threads=16, prefetch_buffer_size=max(ahead, 16))
        self._reader = iter(grain.MapDataset.source(self._slabs).to_iter_dataset(options))
        self._next_step = 0

    def chunk(self, step: int, count: int) -> Tree:
        """On the device: the source's columns [capacity,B,...], zeros after the first `count`."""
        size, columns = self._slabs.size, len(self._columns)
        if step != self._next_step:
            self._reader.set_state({"next_index": step * columns // size})
        self._next_step = -1  # should a read fail, the next call starts afresh
        host = {
            key: np.zeros((self.capacity * columns, *shape), self._dtypes[key]) for key, shape in self._shapes.items()
        }
        for start in range(0, count * columns, size):
            for key, array in next(self._reader).items():
                host[key][start : start + size] = array
        self._next_step = step + count
        return {key: self._put(array.reshape(self.capacity, columns, *array.shape[1:])) for key, array in host.items()}

    def batch(self, chunk: Tree, i: Array) -> Batch:
        """Take one batch out."""
        columns = {key: chunk[key][i] for key in self._shapes}
        return jax.lax.with_sharding_constraint(columns, self._rows) | {"index": positions(self._batch_size)}

    def _put(self, array: np.ndarray) -> Array:
        """The global array, of which `array` [capacity, rows, ...] is this process's rows."""
        sharding = NamedSharding(self._rows.mesh, P(None, *self._rows.spec))

        def part(where: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = where[1].indices(self._batch_size)
            first = int(np.searchsorted(self._columns, start))
            return array[:, first : first + stop - start]

        return tree.place_parts((self.capacity, self._batch_size, *array.shape[2:]), sharding, part)


def local_rows(rows: NamedSharding, batch_size: int) -> np.ndarray:
    """The rows of a batch that this process's devices hold, ascending: i64[n]."""
    held = {where[0].indices(batch_size)[:2] for where in rows.addressable_devices_indices_map((batch_size,)).values()}
    return np.unique(np.concatenate([np.arange(start, stop) for start, stop in held]))


def stream(source: Source, batch_size: int, seed: int, rows: NamedSharding, most: int, megabytes: int) -> StreamFeed:
    """A feed whose chunks hold up to `most` batches: the one in use and the next fit into `megabytes` a process."""
    processes = len({device.process_index for device in rows.mesh.devices.flat})
    a_batch = example_bytes(source) * batch_size // processes
    capacity = max(1, min(most, megabytes * 2**20 // (2 * a_batch)))
    return StreamFeed(source, batch_size, seed, rows, capacity)
