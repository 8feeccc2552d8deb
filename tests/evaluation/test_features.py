import dataclasses

import jax
import numpy as np
import pytest

from diffusion_jax import networks, tree
from diffusion_jax.data.source import ArraySource, Dataset, to_uint8
from diffusion_jax.evaluation import cache, extractors, features, real
from diffusion_jax.types import ImageSpec


class Forbidden:
    def __len__(self):
        raise AssertionError("the held-out images were looked at")

    __getitem__ = __len__


class Slow:
    """A source that isn't in memory."""

    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        return self.source[index]


def small(dataset, count=160):
    """The first digits, with held-out ones that nobody may read."""
    train = ArraySource(image=dataset.train.image[:count], label=dataset.train.label[:count])
    return dataclasses.replace(dataset, train=train, held_out=Forbidden())


@pytest.fixture
def features_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "diffusion_jax" / "features"


def assert_same(first, second):
    assert first.fingerprint == second.fingerprint
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(first.weights), jax.device_get(second.weights))


def test_recognises_held_out_digits(dataset, extractor):
    assert np.mean(extractor.predict(dataset.held_out.image) == dataset.held_out.label) >= 0.975


def test_features_are_standardised_over_the_training_images(dataset, extractor):
    known = extractor.extract(dataset.train.image)
    assert known.shape == (1198, extractors.FEATURES)
    assert known.dtype == np.float64
    np.testing.assert_allclose(known.mean(0), 0.0, atol=1e-4)
    assert np.all(known.std(0) < 1.001)
    assert np.median(known.std(0)) == pytest.approx(1.0, abs=1e-3)


def test_training_twice_gives_the_same_bits_and_reads_no_held_out_image(dataset, features_dir, monkeypatch):
    first = features.build(small(dataset))
    (file,) = features_dir.iterdir()
    assert file.name == f"{first.digest}.npz"
    file.unlink()
    assert_same(first, features.build(small(dataset)))
    monkeypatch.setattr(extractors, "_train", None)  # from now on only the cache can answer
    assert_same(first, features.build(small(dataset)))


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "other arrays", "flipped byte"])
def test_a_damaged_cache_file_is_made_again(tmp_path, monkeypatch, damage):
    file, wanted = tmp_path / "features.npz", {"a": {"b": np.arange(500.0)}}
    cache._save(file, wanted)
    whole = file.read_bytes()
    middle = len(whole) // 2
    match damage:
        case "cut":
            file.write_bytes(whole[:middle])
        case "empty":
            file.write_bytes(b"")
        case "text":
            file.write_text("not a zip file")
        case "other arrays":
            np.savez(file, other=np.zeros(3))
        case "flipped byte":
            file.write_bytes(whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :])
    calls = []

    def fit():
        calls.append(1)
        return wanted

    monkeypatch.setattr(cache, "path", lambda name: file)
    for _ in range(2):
        found = cache.fetch("features", wanted, fit)
        np.testing.assert_array_equal(found["a"]["b"], wanted["a"]["b"])
    assert len(calls) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["features.npz"]


def test_a_cache_that_cannot_be_written_is_not_fatal(tmp_path, monkeypatch):
    (tmp_path / "diffusion_jax").write_text("a file where the directory should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    wanted = {"a": np.ones(3)}
    assert cache.fetch("name", wanted, lambda: wanted) is wanted


def test_the_digest_depends_on_images_labels_and_recipe(generator):
    images, labels = generator.integers(0, 256, (5, 4, 4, 1)).astype(np.uint8), np.arange(5, dtype=np.int32)
    digests = [
        cache.digest(images, labels, "r"),
        cache.digest(images, labels, "s"),
        cache.digest(images, None, "r"),
        cache.digest(images, labels[::-1], "r"),
        cache.digest(images[::-1], labels, "r"),
        cache.digest(images.reshape(5, 2, 8, 1), labels, "r"),
    ]
    assert len(set(digests)) == len(digests)
    assert cache.digest(images.copy(), labels.astype(np.int64), "r") == digests[0]


def test_one_compilation_whatever_the_number_of_images(dataset, extractor):
    image = dataset.train.image
    some = extractor.extract(image[:300])
    compiled = extractor.forward._cache_size()
    np.testing.assert_array_equal(extractor.extract(image[:7]), some[:7])
    np.testing.assert_array_equal(extractor.extract(to_uint8(image[256:300], 17)), some[256:300])
    assert extractor.forward._cache_size() == compiled == 1


def test_data_without_labels_has_principal_components(generator, features_dir):
    spec = ImageSpec(size=8, channels=3, num_classes=0)
    image = generator.integers(0, 256, (90, 8, 8, 3)).astype(np.uint8)
    built = features.build(
        Dataset(name="x", spec=spec, train=ArraySource(image=image, label=None), held_out=Forbidden())
    )
    assert "64 principal components" in built.name
    assert built.predict(image) is None
    flat = image.reshape(90, -1) / 127.5 - 1.0
    variances = np.linalg.eigvalsh(np.cov(flat, rowvar=False))[::-1][:64]
    found = np.cov(built.extract(image), rowvar=False)
    np.testing.assert_allclose(found, np.diag(variances / variances.mean()), atol=1e-4)


def test_larger_and_coloured_images_train(generator, features_dir):
    spec = ImageSpec(size=28, channels=3, num_classes=2)
    label = np.arange(64, dtype=np.int32) % 2
    image = generator.integers(0, 128, (64, *spec.shape)) + 100 * label[:, None, None, None]
    train = ArraySource(image=image.astype(np.uint8), label=label)
    built = features.build(Dataset(name="x", spec=spec, train=train, held_out=Forbidden()))
    assert np.mean(built.predict(train.image) == label) > 0.9


@pytest.mark.parametrize("size", [4, 8, 9, 16, 28, 32, 64, 256])
def test_the_classifier_fits_any_size(size):
    network = networks.build_classifier(ImageSpec(size=size, channels=3, num_classes=7), 64)
    params = jax.eval_shape(network.init, jax.random.key(0))
    logits, hidden = jax.eval_shape(network.apply, params, jax.ShapeDtypeStruct((5, size, size, 3), np.float32))
    assert (logits.shape, hidden.shape) == ((5, 7), (5, 64))
    assert tree.count(params) < 1_000_000


def test_choose_is_spread_over_the_whole_source(dataset):
    chosen = real.choose(dataset.train, 100)
    assert len(chosen) == 100
    assert np.bincount(chosen.label, minlength=10).min() > 0
    slow = real.choose(Slow(dataset.train), 100)
    np.testing.assert_array_equal(chosen.image, slow.image)
    np.testing.assert_array_equal(chosen.label, slow.label)
    assert len(real.choose(dataset.train, 5000)) == 1198


def test_quantise_puts_everything_on_the_datas_grey_levels(dataset):
    spec = dataset.spec
    grid = real.quantise(dataset.train.image, spec)
    assert len(np.unique(grid)) == 17
    np.testing.assert_array_equal(real.quantise(grid, spec), grid)
    np.testing.assert_array_equal(real.quantise(np.clip(grid, 1, 254), spec), grid)
    every = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    np.testing.assert_array_equal(real.quantise(every, ImageSpec(size=16, channels=1, num_classes=0)), every)
