import importlib.util
import json

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.datasets import load_digits

from diffusion_jax import data
from diffusion_jax.data import encoded
from diffusion_jax.data import tfds as tfds_module
from diffusion_jax.data.source import to_arrays
from diffusion_jax.errors import UserError
from diffusion_jax.settings import DataSettings
from diffusion_jax.types import ImageSpec

TRUTH = load_digits()


def eight_bit(index):
    return np.rint(TRUTH.images[index] * 255.0 / 16.0).astype(np.uint8)


class DigitsForTests(tfds.core.GeneratorBasedBuilder):
    """The digits as a TFDS set, with features beside image and label that nothing here needs."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        grey = tfds.features.Image(shape=(8, 8, 1))
        features = {"image": grey, "label": tfds.features.ClassLabel(num_classes=10), "mask": grey}
        features |= {"number": np.int64, "parts": tfds.features.Sequence({"name": tfds.features.Text(), "piece": grey})}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(0, 300), "test": self._generate_examples(300, 400)}

    def _generate_examples(self, start, stop):
        for i in range(start, stop):
            image = Image.fromarray(eight_bit(i))
            parts = [{"name": "all", "piece": image}]
            yield i, {"image": image, "label": TRUTH.target[i], "mask": image, "number": i, "parts": parts}


class PhotosForTests(tfds.core.GeneratorBasedBuilder):
    """Images of several sizes and modes, without labels: what real sets hold."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict({"image": tfds.features.Image(shape=(None, None, 3))})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(dl_manager.download_dir, ("RGB", "L", "P", "RGBA"))}

    def _generate_examples(self, folder, modes):
        for i, mode in enumerate(modes):
            path = folder / f"{mode}.png"
            Image.new("RGB", (30 + 10 * i, 20), (90, 90, 90)).convert(mode).save(path)
            yield mode, {"image": str(path)}


class WordsForTests(tfds.core.GeneratorBasedBuilder):
    """No images at all."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(), "test": self._generate_examples()}

    def _generate_examples(self):
        yield 0, {"text": "nothing to see"}


def prepare(builder_class, folder):
    (folder / "downloads").mkdir(parents=True)
    builder = builder_class(data_dir=folder, file_format="array_record")
    builder.download_and_prepare(download_dir=folder / "downloads")
    return folder


@pytest.fixture(scope="module")
def digits_dir(tmp_path_factory):
    return prepare(DigitsForTests, tmp_path_factory.mktemp("tfds") / "digits")


def build(name, data_dir, **more):
    return data.build(DataSettings(name=name, data_dir=str(data_dir), **more))


def refusal(name, data_dir, **more):
    with pytest.raises(UserError) as refused:
        build(name, data_dir, **more)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def as_stored(digits_dir):
    """The digits' numbers in the order in which TFDS, which shuffles, stored the training split."""
    rows = tfds.builder("digits_for_tests", data_dir=digits_dir).as_data_source("train")
    return [int(row["number"]) for row in rows]


def test_pixels_and_labels_come_back_exactly(digits_dir):
    dataset = build("tfds:digits_for_tests", digits_dir)
    assert dataset.spec == ImageSpec(size=8, channels=1, num_classes=10)
    assert (len(dataset.train), len(dataset.held_out)) == (300, 100)
    assert dataset.train[0].keys() == {"image", "label"}
    numbers = as_stored(digits_dir)
    assert sorted(numbers) == list(range(300))
    for i, number in enumerate(numbers):
        example = dataset.train[i]
        np.testing.assert_array_equal(example["image"][..., 0], eight_bit(number))
        assert example["label"] == TRUTH.target[number]
    everything = to_arrays(dataset.train)
    assert everything.image.shape == (300, 8, 8, 1)
    assert everything.image.dtype == np.uint8
    np.testing.assert_array_equal(everything.label, TRUTH.target[numbers])


def test_what_is_prepared_anew_is_another_set(digits_dir, tmp_path, monkeypatch):
    """What a tokenizer made of one is not read for another of that name, nor for another slice, if no image is seen."""

    def digest(folder, split="train"):
        return encoded.digest(build("tfds:digits_for_tests", folder, train_split=split).train, "about")

    seen = build("tfds:digits_for_tests", digits_dir).train[0]
    monkeypatch.setattr(tfds_module.RecordSource, "__getitem__", lambda self, index: seen)
    assert digest(digits_dir) == digest(digits_dir)
    assert digest(digits_dir, "train[:150]") != digest(digits_dir, "train[150:]")
    monkeypatch.setitem(TRUTH, "images", np.zeros_like(TRUTH.images))
    assert digest(prepare(DigitsForTests, tmp_path / "blank")) != digest(digits_dir)


def test_split_strings_slice_and_join(digits_dir):
    dataset = build("tfds:digits_for_tests:1.0.0", digits_dir, train_split="train[:90%]", held_out_split="train[90%:]")
    assert (len(dataset.train), len(dataset.held_out)) == (270, 30)
    numbers = as_stored(digits_dir)
    np.testing.assert_array_equal(dataset.train[269]["image"][..., 0], eight_bit(numbers[269]))
    np.testing.assert_array_equal(dataset.held_out[0]["image"][..., 0], eight_bit(numbers[270]))
    joined = build("tfds:digits_for_tests", digits_dir, train_split="train[10:20]+test[:5]", held_out_split="test[5:]")
    assert (len(joined.train), len(joined.held_out)) == (15, 95)


def test_examples_without_label_in_a_set_with_classes_are_refused():
    spec = ImageSpec(size=8, channels=1, num_classes=10)
    record = {"image": eight_bit(0)[..., None], "label": 3}
    assert tfds_module.example(record, spec)["label"] == 3
    with pytest.raises(UserError, match="without a label"):
        tfds_module.example(record | {"label": -1}, spec)


def test_labels_are_not_read_where_they_are_not_wanted(digits_dir):
    """So that splits without them serve, too: they are not even parsed."""
    plain, labelled = (build("tfds:digits_for_tests", digits_dir, labels=labels) for labels in (False, True))
    assert plain.spec == ImageSpec(size=8, channels=1, num_classes=0)
    assert plain.train[7].keys() == {"image"}
    assert set(plain.train.source.features) == {"image"}
    np.testing.assert_array_equal(plain.train[7]["image"], labelled.train[7]["image"])


def test_digits_are_resized_when_asked(digits_dir):
    dataset = build("tfds:digits_for_tests", digits_dir, image_size=4)
    assert dataset.spec.shape == (4, 4, 1)
    number = as_stored(digits_dir)[3]
    blocks = eight_bit(number).astype(np.float64).reshape(4, 2, 4, 2).mean(axis=(1, 3))
    np.testing.assert_allclose(dataset.train[3]["image"][..., 0], blocks, atol=1.0)  # Pillow rounds after each axis


def test_a_set_is_read_without_its_code(digits_dir, monkeypatch):
    monkeypatch.delitem(tfds.core.registered._DATASET_REGISTRY, "digits_for_tests")
    assert len(build("tfds:digits_for_tests", digits_dir).train) == 300


def test_grey_palette_and_transparent_files_become_rgb(tmp_path):
    prepare(PhotosForTests, tmp_path / "photos")
    kwargs = {"train_split": "train[:3]", "held_out_split": "train[3:]"}
    dataset = build("tfds:photos_for_tests", tmp_path / "photos", image_size=10, **kwargs)
    assert dataset.spec == ImageSpec(size=10, channels=3, num_classes=0)
    for example in (*(dataset.train[i] for i in range(3)), dataset.held_out[0]):
        assert example.keys() == {"image"}
        assert example["image"].shape == (10, 10, 3)
        np.testing.assert_allclose(example["image"].astype(int), 90, atol=15)  # the web palette is coarse
    sentence = refusal("tfds:photos_for_tests", tmp_path / "photos", **kwargs)
    assert "data.image_size = 0" in sentence


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"train_split": "training"}, ["data.train_split = 'training'", "train, test"]),
        ({"held_out_split": "validation"}, ["data.held_out_split = 'validation'", "train, test"]),
        ({"train_split": "train[:10"}, ["data.train_split = 'train[:10'"]),
        ({"train_split": "train[:0]"}, ["data.train_split = 'train[:0]'"]),
        ({"held_out_split": "train[90%:]"}, ["data.held_out_split", "shares images", "data.train_split"]),
    ],
)
def test_wrong_splits(digits_dir, more, words):
    sentence = refusal("tfds:digits_for_tests", digits_dir, **more)
    assert all(word in sentence for word in words)


def test_wrong_names(digits_dir, tmp_path):
    assert "did you mean 'tfds:mnist'?" in refusal("tfds:mnits", digits_dir)
    for name in ("tfds:qqqqqqqqqq", "tfds:", "tfds:no/such", "tfds:two words", "tfds:mnist:9.9.9", "tfds:ns:foo"):
        assert refusal(name, digits_dir).startswith(f"data.name = {name!r}")
    prepare(WordsForTests, tmp_path / "words")
    assert "'image'" in refusal("tfds:words_for_tests", tmp_path / "words")


@pytest.mark.parametrize("name", ["mnist", "imagenet2012", "coco"])  # coco's code cannot be loaded without TensorFlow
def test_a_set_that_is_not_prepared_says_how_to_prepare_it(name, tmp_path):
    sentence = refusal(f"tfds:{name}", tmp_path, image_size=32)
    assert f"tfds build {name} --file_format=array_record --data_dir={tmp_path}" in sentence
    assert "data.data_dir" in sentence
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(importlib.util.find_spec("tensorflow") is not None, reason="TensorFlow is here")
def test_a_set_in_tfrecord_alone_asks_for_tensorflow(tmp_path):
    folder = prepare(DigitsForTests, tmp_path / "digits") / "digits_for_tests" / "1.0.0"
    info = json.loads((folder / "dataset_info.json").read_text())
    assert info["fileFormat"] == "array_record"
    (folder / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    for file in folder.glob("*.array_record-*"):
        file.rename(folder / file.name.replace("array_record", "tfrecord"))
    sentence = refusal("tfds:digits_for_tests", tmp_path / "digits")
    assert "tfds:digits_for_tests" in sentence
    assert "pip install 'diffusion_jax[tensorflow]'" in sentence
    assert "file_format='array_record'" in sentence


@pytest.mark.skipif(importlib.util.find_spec("tensorflow") is None, reason="needs the extra [tensorflow]")
def test_a_set_in_tfrecord_alone_is_read_through_tensorflow(tmp_path, digits_dir):
    DigitsForTests(data_dir=tmp_path, file_format="tfrecord").download_and_prepare()
    dataset = build("tfds:digits_for_tests", tmp_path, train_split="train[:50%]", held_out_split="train[50%:]")
    expected = build("tfds:digits_for_tests", digits_dir)
    assert dataset.spec == expected.spec
    assert (len(dataset.train), len(dataset.held_out)) == (150, 150)
    found = np.concatenate([dataset.train.image, dataset.held_out.image])
    labels = np.concatenate([dataset.train.label, dataset.held_out.label])
    everything = to_arrays(expected.train)  # the same hash of the keys shuffles both formats
    np.testing.assert_array_equal(found, everything.image)
    np.testing.assert_array_equal(labels, everything.label)


@pytest.mark.parametrize(
    ("name", "size", "spec"),
    [
        ("mnist", 0, ImageSpec(size=28, channels=1, num_classes=10)),
        ("fashion_mnist", 0, ImageSpec(size=28, channels=1, num_classes=10)),
        ("cifar10", 0, ImageSpec(size=32, channels=3, num_classes=10)),
        ("cifar10", 16, ImageSpec(size=16, channels=3, num_classes=10)),
        ("imagenet2012", 24, ImageSpec(size=24, channels=3, num_classes=1000)),
        ("celeb_a", 64, ImageSpec(size=64, channels=3, num_classes=0)),
        ("lsun", 16, ImageSpec(size=16, channels=3, num_classes=0)),
    ],
)
def test_mocked_public_sets(name, size, spec):
    with tfds.testing.mock_data(num_examples=5):
        dataset = build(f"tfds:{name}", "", image_size=size)
        assert dataset.spec == spec
        examples = [dataset.train[i] for i in range(len(dataset.train))]
    assert len(examples) == 5
    for example in examples:
        assert example.keys() == ({"image", "label"} if spec.num_classes else {"image"})
        assert example["image"].shape == spec.shape
        assert example["image"].dtype == np.uint8
        assert 0 <= example.get("label", 0) < max(spec.num_classes, 1)


@pytest.mark.parametrize(("name", "found"), [("imagenet2012", "any x any"), ("celeb_a", "218 x 178")])
def test_mocked_sets_without_one_square_size_need_a_size(name, found):
    with tfds.testing.mock_data(num_examples=2):
        sentence = refusal(f"tfds:{name}", "")
    assert "data.image_size = 0" in sentence
    assert found in sentence


def test_mocked_pixels_are_the_mock_s_own():
    with tfds.testing.mock_data(num_examples=4):
        rows = tfds.data_source("mnist", split="train")
        dataset = build("tfds:mnist", "")
        for i in range(4):
            np.testing.assert_array_equal(dataset.train[i]["image"], rows[i]["image"])
            assert dataset.train[i]["label"] == rows[i]["label"]
