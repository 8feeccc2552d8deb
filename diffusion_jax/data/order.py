"""Which example stands at which position of a run's endless stream: a pure function of (seed, position).

Example number p of the stream stands in epoch p // N, at place p % N of that epoch's permutation. There is no iterator
whose state could be lost: batch `step` is positions step * B .. (step + 1) * B - 1.
"""

import functools
import threading

import numpy as np

_lock = threading.Lock()  # reading threads meet at the start of an epoch: one of them sorts, the others wait


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    words = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(size)
    order = np.argsort(words, kind="stable")
    order.flags.writeable = False  # the cache hands the same array to everyone
    return order


def permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order of epoch `epoch`: i64[size]. Sorting raw Philox words, whose values NumPy guarantees for ever."""
    with _lock:
        return _permutation(seed, epoch, size)


def examples(seed: int, start: int, count: int, size: int) -> np.ndarray:
    """Indices i32[count] of the examples at positions start .. start + count - 1, of a data set of `size`."""
    return at(seed, np.arange(start, start + count), size)


def at(seed: int, positions: np.ndarray, size: int) -> np.ndarray:
    """Indices i32[count] of the examples at `positions` i64[count], of a data set of `size`."""
    epochs, places = np.divmod(positions, size)
    out = np.empty(len(positions), np.int32)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        out[here] = permutation(seed, int(epoch), size)[places[here]]
    return out
