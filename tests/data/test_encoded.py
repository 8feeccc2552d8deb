"""What a tokenizer makes of images: read once, kept whole or not at all, and fed like images."""

import os

import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from PIL import Image

from diffusion_jax import data
from diffusion_jax.data import encoded, folder
from diffusion_jax.data.source import ArraySource
from diffusion_jax.types import ImageSpec
from tests.data.test_feed import batches, mesh_rows


class OnDisk:
    """A source that counts how often an image is read."""

    def __init__(self, count, labelled=True):
        self.count, self.labelled, self.reads = count, labelled, 0

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.reads += 1
        example = {"image": np.full((2, 2, 1), index, np.uint8)}
        return example | {"label": index % 3} if self.labelled else example


def halves(images):
    """A tokenizer: of u8 images what they are as floats, halved, in one place."""
    return images[:, :1, :1] / 2.0


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "diffusion_jax" / "encoded"


def refuse(images):
    raise AssertionError("read again")


def expected(count):
    return ((np.arange(count) / 127.5 - 1.0) / 2.0).astype(np.float32)


@pytest.mark.parametrize("labelled", [True, False])
def test_images_on_disk_are_encoded_once(labelled):
    source = OnDisk(200, labelled)
    first = encoded.fetch(source, "a", halves)
    np.testing.assert_allclose(np.asarray(first.encoded).reshape(-1), expected(200), atol=1e-6)
    before = source.reads
    again = encoded.fetch(source, "a", refuse)
    assert source.reads - before <= 256  # to tell one data set from another
    np.testing.assert_array_equal(again.encoded, first.encoded)
    for it in (first, again):
        assert (it.label is not None) == labelled
        assert not labelled or np.array_equal(it.label, np.arange(200) % 3)


def test_other_images_and_other_tokenizers_are_kept_apart():
    images = [np.full((4, 2, 2, 1), value, np.float32) for value in (0.25, 0.5)]
    sources = [ArraySource(image=image, label=None) for image in images]
    found = [encoded.fetch(source, about, halves).encoded[0, 0, 0, 0] for source in sources for about in "ab"]
    assert found == [0.125, 0.125, 0.25, 0.25]
    assert len({encoded.digest(source, about) for source in sources for about in "ab"}) == 4


def test_other_labels_are_kept_apart():
    image = np.zeros((4, 2, 2, 1), np.float32)
    labels = (None, np.array([0, 0, 1, 1], np.int32), np.array([0, 1, 1, 1], np.int32))
    assert len({encoded.digest(ArraySource(image=image, label=label), "a") for label in labels}) == 3
    assert encoded.digest(OnDisk(4), "a") != encoded.digest(OnDisk(4, labelled=False), "a")


def test_files_that_nobody_looks_into_are_told_apart(tmp_path, monkeypatch):
    """By their names, sizes and times of change: of 6 images the first and the last are looked at."""
    monkeypatch.setattr(encoded, "_PROBES", 2)
    for i in range(6):
        file = tmp_path / "images" / "ab"[i // 3] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((2, 2), 40 * i, np.uint8)).save(file)

    def digest():
        files = tuple(folder.walk(tmp_path / "images"))
        spec = ImageSpec(size=2, channels=1, num_classes=2)
        return encoded.digest(folder.FolderSource(files=files, classes=("a", "b"), spec=spec), "about")

    first = digest()
    assert digest() == first
    moved, place = tmp_path / "images" / "b" / "1.png", tmp_path / "images" / "a" / "1.png"
    place.rename(moved)
    assert digest() != first
    moved.rename(place)
    assert digest() == first
    os.utime(place, (1, 1))
    assert digest() != first


def test_a_file_is_whole_or_not_there(cache):
    source = ArraySource(image=np.zeros((3000, 2, 2, 1), np.float32), label=None)

    def interrupted(images):
        if len(list(cache.glob(".*partial"))) and interrupted.blocks:
            raise KeyboardInterrupt
        interrupted.blocks += 1
        return halves(images)

    interrupted.blocks = 0
    with pytest.raises(KeyboardInterrupt):
        encoded.fetch(source, "a", interrupted)
    assert list(cache.iterdir()) == []
    assert len(encoded.fetch(source, "a", halves)) == 3000


def test_a_damaged_file_is_made_again(cache):
    source = ArraySource(image=np.ones((5, 2, 2, 1), np.float32), label=None)
    encoded.fetch(source, "a", halves)
    (file,) = cache.glob("*.npy")
    file.write_bytes(file.read_bytes()[:40])
    np.testing.assert_array_equal(encoded.fetch(source, "a", halves).encoded, np.full((5, 1, 1, 1), 0.5))


def test_moments_are_those_of_all_examples_and_places():
    draws = np.random.default_rng(0).normal(2.0, 3.0, (2500, 3, 3, 2)).astype(np.float32)
    mean, std = encoded.EncodedSource(encoded=draws, label=None).moments()
    np.testing.assert_allclose(mean, draws.astype(np.float64).mean((0, 1, 2)), rtol=1e-10)
    np.testing.assert_allclose(std, draws.astype(np.float64).std((0, 1, 2)), rtol=1e-10)


def test_it_streams_as_it_lies_on_the_device():
    source = encoded.EncodedSource(
        encoded=np.arange(48 * 4, dtype=np.float32).reshape(48, 2, 2, 1), label=np.arange(48, dtype=np.int32)
    )
    rows = mesh_rows((2,), P("data"))
    feeds = [
        data.build_feed(source, batch_size=8, seed=3, rows=rows, steps_per_chunk=2, device_megabytes=megabytes)
        for megabytes in (1, 0)
    ]
    for ours, theirs in zip(*(batches(feed, 0, 8) for feed in feeds), strict=True):
        assert set(ours) == set(theirs) == {"encoded", "label", "index"}
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name])
        np.testing.assert_array_equal(ours["encoded"][:, 0, 0, 0], 4 * ours["label"])
