"""Samples files are written while images are being made: the same file, whole or not there, in constant memory."""

import io
import json
import tracemalloc
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import rng
from diffusion_jax.cli import drawing
from diffusion_jax.sampling import Sampler
from diffusion_jax.settings import MeshSettings
from diffusion_jax.training.sharding import make_mesh
from diffusion_jax.types import ImageSpec

SPEC = ImageSpec(size=4, channels=3, num_classes=3, levels=17)
ABOUT = {"step": 7, "sample": {"solver": "ddim(eta=1.0)"}}


def noisy(weights, keys, rows, options):
    """Images that differ by key and label."""
    return jnp.tanh(rng.normal(keys, SPEC.shape) + rows["label"].astype(jnp.float32)[:, None, None, None])


def sampler(batch_size, act=noisy):
    return Sampler(act, SPEC, make_mesh(MeshSettings()), batch_size)


def incompressible(count, size, seed=0):
    """`count` batches of 1 image of `size` bytes."""
    generator = np.random.default_rng(seed)
    return (generator.integers(0, 256, (1, 1, size, 1), np.uint8) for _ in range(count))


def npy(array):
    """What numpy itself writes."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize("batch_size", [8, 16, 64])
def test_the_batch_size_changes_no_byte(tmp_path, batch_size):
    """23 images: a short last batch after two full ones, after one, and nothing but a short one."""
    it, out = sampler(batch_size), tmp_path / "x.npz"
    rows = it.labels(23)
    drawing.write(out, ABOUT, 23, it.images({}, 5, rows, 23, {}), label=rows["label"], trajectory=None)

    label = np.arange(23) % 3
    normal = jax.vmap(lambda key: jax.random.normal(key, (4, 4, 3)))(rng.sample_keys(5, jnp.arange(23)))
    unit = (np.tanh(np.asarray(normal, np.float64) + label[:, None, None, None]) + 1) / 2
    levels = np.linspace(0, 1, 17)
    nearest = np.abs(unit[..., None] - levels).argmin(-1)
    images = np.rint(levels * 255).astype(np.uint8)[nearest]

    with zipfile.ZipFile(out) as archive:
        assert archive.namelist() == ["images.npy", "label.npy", "about.npy"]
        assert {member.compress_type for member in archive.infolist()} == {zipfile.ZIP_DEFLATED}
        assert archive.read("images.npy") == npy(images)
        assert archive.read("label.npy") == npy(label.astype(np.int32))
    with np.load(out) as file:
        assert json.loads(str(file["about"])) == ABOUT
    np.testing.assert_array_equal(it.draw({}, 5, rows, 23, {}), images)


def test_other_columns_come_in_batches_too(tmp_path):
    """Also where a batch does not lie in C order, as a device may hand it out."""
    stops = np.random.default_rng(0).normal(size=(5, 3, 4, 4, 1)).astype(np.float32)
    batches = (np.asfortranarray(stops[i : i + 2]) for i in (0, 2, 4))
    drawing.write(tmp_path / "x.npz", ABOUT, 5, incompressible(5, 8), label=None, trajectory=batches)
    with np.load(tmp_path / "x.npz") as file:
        assert set(file) == {"images", "trajectory", "about"}
        np.testing.assert_array_equal(file["trajectory"], stops)
        assert file["trajectory"].dtype == np.float32


def test_a_batch_is_written_before_the_last_one_is_made(tmp_path):
    """When batch i is asked for, the batches before it are on disk, less what is still in the buffers."""
    size, on_disk = 1_000_000, []

    def watched():
        for batch in incompressible(4, size):
            on_disk.append(sum(file.stat().st_size for file in tmp_path.iterdir()))
            yield batch

    drawing.write(tmp_path / "x.npz", ABOUT, 4, watched())
    np.testing.assert_allclose(on_disk, np.arange(4) * size, atol=0.5 * size)


def test_the_device_has_the_next_batch_before_one_is_handed_out():
    it, happened = sampler(8), []

    def program(weights, seed, index, rows, options):
        happened.append(f"dispatch {index[0]}")
        return jnp.zeros((8, *SPEC.shape))

    it.program = program
    for i, _ in enumerate(it.images({}, 0, it.labels(20), 20, {})):
        happened.append(f"write {8 * i}")
    assert happened == ["dispatch 0", "dispatch 8", "write 0", "dispatch 16", "write 8", "write 16"]


def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    size = 2**18

    def peak(count):
        tracemalloc.reset_peak()
        drawing.write(tmp_path / "x.npz", ABOUT, count, incompressible(count, size))
        return tracemalloc.get_traced_memory()[1]

    tracemalloc.start()
    try:
        peak(1)  # imports
        assert peak(32) < peak(4) + size
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_what_fails_midway_leaves_everything_as_it_was(tmp_path, error, there):
    out = tmp_path / "x.npz"
    if there:
        out.write_bytes(b"older samples")

    def failing():
        yield from incompressible(2, 100_000)
        assert len(list(tmp_path.iterdir())) == 1 + there  # the file that is being written
        raise error("midway")

    with pytest.raises(error, match="midway"):
        drawing.write(out, ABOUT, 3, failing())
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == (
        {"x.npz": b"older samples"} if there else {}
    )


def test_images_may_be_more_than_a_plain_zip_holds(tmp_path, monkeypatch):
    """Beyond 2 GiB zipfile refuses a member that was not announced as large; here beyond 1000 bytes."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 1000)
    drawing.write(tmp_path / "x.npz", ABOUT, 3, incompressible(3, 1000))
    with np.load(tmp_path / "x.npz") as file:
        np.testing.assert_array_equal(file["images"], np.concatenate(list(incompressible(3, 1000))))
