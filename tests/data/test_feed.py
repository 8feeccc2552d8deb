import threading
import time

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from diffusion_jax import data
from diffusion_jax.data import stream
from diffusion_jax.data.feed import ResidentFeed
from diffusion_jax.data.source import ArraySource, Dataset
from diffusion_jax.types import ImageSpec


def numbered(size, labels=True, side=4):
    """A data set whose image i is filled with i (three bytes of it) and has the label i % 10."""
    number = np.arange(size)
    colour = np.stack([number & 255, number >> 8 & 255, number >> 16], axis=-1).astype(np.uint8)
    image = np.broadcast_to(colour[:, None, None], (size, side, side, 3)).copy()
    source = ArraySource(image=image, label=(number % 10).astype(np.int32) if labels else None)
    spec = ImageSpec(size=side, channels=3, num_classes=10 if labels else 0)
    return Dataset(name="numbered", spec=spec, train=source, held_out=source)


def numbers(image):
    """The indices that `numbered` wrote into images [..., H, W, 3]."""
    corner = np.asarray(image)[..., 0, 0, :].astype(np.int64)
    return corner @ np.array([1, 256, 65536])


def mesh_rows(shape, spec):
    count = int(np.prod(shape))
    names = ("data", "fsdp", "tensor")[: len(shape)]
    mesh = jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape), devices=jax.devices()[:count])
    return NamedSharding(mesh, spec)


def rows_of(count):
    return mesh_rows((count,), P("data"))


def build(dataset, rows, megabytes, batch_size=16, seed=5, steps=4):
    return data.build_feed(
        dataset.train, batch_size=batch_size, seed=seed, rows=rows, steps_per_chunk=steps, device_megabytes=megabytes
    )


def batches(feed, step, count):
    """The batches of steps step .. step + count - 1, chunk by chunk, through a compiled `batch`."""
    take = jax.jit(feed.batch)
    out = []
    for start in range(step, step + count, feed.capacity):
        here = min(feed.capacity, step + count - start)
        chunk = feed.chunk(start, here)
        out += [jax.device_get(take(chunk, np.int32(i))) for i in range(here)]
    return out


def assert_equal(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])
            assert a[key].dtype == b[key].dtype


def test_size_chooses_the_feed():
    dataset = numbered(40_000)  # 1.83 MiB
    assert isinstance(build(dataset, rows_of(1), 2), ResidentFeed)
    assert isinstance(build(dataset, rows_of(1), 1), stream.StreamFeed)


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("size", [1000, 10])  # epochs shorter than a run, and shorter than a batch
def test_both_feeds_give_the_same_batches(size, labels):
    dataset = numbered(size, labels)
    resident = batches(build(dataset, rows_of(8), 1), 0, 70)
    assert_equal(batches(build(dataset, rows_of(8), 0), 0, 70), resident)
    assert resident[0].keys() == ({"image", "label", "index"} if labels else {"image", "index"})
    stream_of_numbers = np.concatenate([numbers(batch["image"]) for batch in resident])
    whole = stream_of_numbers[: len(stream_of_numbers) // size * size].reshape(-1, size)
    np.testing.assert_array_equal(np.sort(whole, axis=1), np.tile(np.arange(size), (len(whole), 1)))
    for batch in resident:
        np.testing.assert_array_equal(batch["index"], np.arange(16))
        if labels:
            np.testing.assert_array_equal(batch["label"], numbers(batch["image"]) % 10)


def test_the_stream_may_be_asked_for_any_step():
    dataset = numbered(200)
    feed = stream.StreamFeed(dataset.train, 16, 5, rows_of(2), capacity=3)
    expected = batches(build(dataset, rows_of(1), 1), 0, 40)
    for step, count in ((0, 3), (3, 3), (30, 3), (6, 2), (8, 1), (8, 1), (0, 3)):
        assert_equal(batches(feed, step, count), expected[step : step + count])


def test_a_short_chunk_has_the_shapes_of_a_full_one():
    feed = stream.StreamFeed(numbered(200).train, 16, 5, rows_of(2), capacity=3)
    full, short = feed.chunk(0, 3), feed.chunk(3, 1)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), full) == jax.tree.map(lambda a: (a.shape, a.dtype), short)
    assert full["image"].shape == (3, 16, 4, 4, 3)
    assert full["image"].dtype == np.uint8
    assert not np.asarray(short["image"][1:]).any()


@pytest.mark.parametrize(
    ("shape", "spec"),
    [((1,), P("data")), ((8,), P("data")), ((2, 2), P(("data", "fsdp"))), ((2, 2, 2), P(("data", "fsdp")))],
)
def test_the_mesh_changes_nothing_and_every_device_holds_its_rows(shape, spec):
    dataset = numbered(100)
    rows = mesh_rows(shape, spec)
    expected = batches(build(dataset, rows_of(1), 1), 0, 9)
    for megabytes in (0, 1):
        feed = build(dataset, rows, megabytes)
        assert_equal(batches(feed, 0, 9), expected)
        batch = jax.jit(feed.batch)(feed.chunk(0, feed.capacity), np.int32(0))
        assert batch["image"].sharding.is_equivalent_to(rows, 4)
        assert batch["label"].sharding.is_equivalent_to(rows, 1)


def test_chunk_and_the_next_fit_into_the_budget():
    dataset = numbered(100_000)
    a_batch = 4 * 4 * 3 * 16
    feed = build(dataset, rows_of(1), 1, steps=10_000)
    assert 2 * feed.capacity * a_batch <= 2**20 < 2 * (feed.capacity + 1) * a_batch
    assert build(dataset, rows_of(1), 1, steps=7).capacity == 7
    assert build(dataset, rows_of(1), 0, steps=7).capacity == 1


class Watched:
    """A source that notes who asks for what, and may refuse."""

    def __init__(self, source):
        self.source, self.asked, self.broken = source, [], None
        self.lock = threading.Lock()

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        with self.lock:
            self.asked.append((index, threading.current_thread() is threading.main_thread()))
        if index == self.broken:
            raise OSError("the disk is gone")
        return self.source[index]


def test_the_next_chunk_is_read_in_the_background():
    watched = Watched(numbered(1000).train)
    feed = stream.StreamFeed(watched, 16, 5, rows_of(2), capacity=4)
    watched.asked.clear()
    feed.chunk(0, 4)
    deadline = time.monotonic() + 20.0
    while len(watched.asked) < 2 * 4 * 16 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(watched.asked) >= 2 * 4 * 16
    assert not any(on_main for _, on_main in watched.asked)


def test_a_read_error_reaches_the_caller_and_the_stream_recovers():
    watched = Watched(numbered(100).train)
    feed = stream.StreamFeed(watched, 16, 5, rows_of(1), capacity=2)
    watched.broken = int(numbers(batches(build(numbered(100), rows_of(1), 1), 3, 1)[0]["image"])[0])
    with pytest.raises(OSError, match="the disk is gone"):
        batches(feed, 2, 2)
    watched.broken = None
    assert_equal(batches(feed, 2, 2), batches(build(numbered(100), rows_of(1), 1), 2, 2))


def test_a_process_reads_the_rows_of_its_own_devices_only():
    """Two processes of 4 devices each: what each holds is found in the sharding, not in its number."""

    class Half:
        def __init__(self, devices):
            self.rows, self.devices = rows_of(8), devices

        def addressable_devices_indices_map(self, shape):
            whole = self.rows.devices_indices_map(shape)
            return {device: whole[device] for device in self.devices}

    devices = jax.devices()
    assert stream.local_rows(Half(devices[:4]), 16).tolist() == list(range(8))
    assert stream.local_rows(Half(devices[1::2]), 16).tolist() == [2, 3, 6, 7, 10, 11, 14, 15]
    slabs = stream._Slabs(numbered(100).train, 16, 5, np.array([2, 3, 6, 7, 10, 11]))
    mine = np.stack([numbers(slabs[i]["image"]) for i in range(20)])
    expected = batches(build(numbered(100), rows_of(1), 1), 0, 20)
    np.testing.assert_array_equal(mine, [numbers(batch["image"])[[2, 3, 6, 7, 10, 11]] for batch in expected])
