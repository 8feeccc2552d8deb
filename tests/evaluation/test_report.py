import dataclasses
import json

import numpy as np
import pytest

from diffusion_jax.data.source import ArraySource, to_uint8
from diffusion_jax.errors import UserError
from diffusion_jax.evaluation import report
from diffusion_jax.settings import EvaluateSettings

SETTINGS = EvaluateSettings(bootstrap=50)


def part(source, keep):
    return ArraySource(image=source.image[keep], label=source.label[keep])


@pytest.fixture(scope="module")
def halves(dataset):
    """Real digits that the "model" made, and a data set whose training part lacks them (but not its features)."""
    made = np.random.default_rng(5).permutation(1198) < 599
    samples = part(dataset.train, made)
    return to_uint8(samples.image, 17), samples.label, dataclasses.replace(dataset, train=part(dataset.train, ~made))


@pytest.fixture(scope="module")
def real_report(halves, extractor):
    images, label, rest = halves
    return report.judge(images, label, rest, extractor, SETTINGS)


def class_wise_gaussian(dataset, count):
    """Samples of one Gaussian a class, fitted to the training images."""
    generator = np.random.default_rng(2)
    label = np.arange(count, dtype=np.int32) % 10
    flat = dataset.train.image.reshape(-1, 64)
    images = np.zeros((count, 64))
    for k in range(10):
        own = flat[dataset.train.label == k]
        cov = np.cov(own, rowvar=False)
        images[label == k] = generator.multivariate_normal(own.mean(0), cov, (label == k).sum(), method="eigh")
    return to_uint8(images.reshape(-1, 8, 8, 1), 17), label


def test_real_images_stand_at_the_floor(real_report):
    metrics = real_report["metrics"]
    assert set(metrics) == {"frechet", "kid", "precision", "recall", "label_accuracy"}
    assert 0.7 < real_report["frechet_ratio"] < 1.4
    for name in ("precision", "recall"):
        assert metrics[name]["value"] == pytest.approx(metrics[name]["floor"], abs=0.05)
        assert metrics[name]["value"] > 0.86
    assert metrics["label_accuracy"]["floor"] == real_report["features"]["held_out_accuracy"] >= 0.975
    for row in metrics.values():
        assert row["interval"][0] <= row["value"] <= row["interval"][1]
    assert real_report["n"] == 599
    assert real_report["memorisation"]["exact_copies"] == 0


def test_class_wise_gaussians_are_worse(dataset, extractor, real_report):
    images, label = class_wise_gaussian(dataset, 2000)
    found = report.judge(images, label, dataset, extractor, SETTINGS, light=True)
    assert found["frechet_ratio"] > 2.0 * real_report["frechet_ratio"]
    assert found["metrics"]["kid"]["value"] > found["metrics"]["kid"]["floor"] + 0.01
    assert found["metrics"]["recall"]["value"] < real_report["metrics"]["recall"]["value"] - 0.1
    assert (found["num_samples"], found["n"], found["subsets"], found["bootstrap"]) == (2000, 599, 10, 0)
    assert found["metrics"]["frechet"]["interval"] is None


def test_noise_is_far_off(dataset, extractor, generator):
    noise = generator.integers(0, 256, (300, 8, 8, 1)).astype(np.uint8)
    label = np.arange(300, dtype=np.int32) % 10
    found = report.judge(noise, label, dataset, extractor, SETTINGS, light=True)
    assert found["frechet_ratio"] > 8.0
    assert found["metrics"]["precision"]["value"] < 0.2
    assert found["metrics"]["label_accuracy"]["value"] < 0.3


def test_wrong_labels_are_seen(halves, extractor):
    images, label, rest = halves
    found = report.judge(images, (label + 1) % 10, rest, extractor, SETTINGS, light=True)
    assert found["metrics"]["label_accuracy"]["value"] < 0.05


def test_copies_are_counted_and_said(dataset, extractor, generator):
    images, label = to_uint8(dataset.train.image[:100], 17), dataset.train.label[:100]
    found = report.judge(images, label, dataset, extractor, SETTINGS, light=True)
    assert found["memorisation"]["exact_copies"] == 100
    assert found["memorisation"]["samples"] < 1e-6 < found["memorisation"]["held_out"]


def test_the_same_images_get_the_same_report(halves, extractor, real_report):
    assert report.judge(*halves, extractor, SETTINGS) == real_report


def test_survives_json_and_renders(real_report):
    again = json.loads(json.dumps(real_report))
    text = report.render(again)
    assert text == report.render(real_report)
    for word in ("frechet", "kid", "recall", "real floor", "lower", "higher", fingerprint(real_report)):
        assert word in text
    table = text.splitlines()[:8]
    assert len({line.index("..") for line in table if ".." in line}) <= 2
    assert max(map(len, table)) < 100


def fingerprint(found):
    return found["features"]["fingerprint"]


def test_without_labels_there_is_no_label_accuracy(halves, extractor):
    images, _, rest = halves
    found = report.judge(images, None, rest, extractor, SETTINGS, light=True)
    assert "label_accuracy" not in found["metrics"]
    assert "label_accuracy" not in report.render(found)


@pytest.mark.parametrize(
    ("images", "label", "words"),
    [
        (np.zeros((60, 16, 16, 1), np.uint8), None, ["(16, 16, 1)", "(8, 8, 1)"]),
        (np.zeros((60, 8, 8), np.uint8), None, ["(8, 8)", "(8, 8, 1)"]),
        (np.zeros((60, 8, 8, 1), np.float32), None, ["float32", "uint8"]),
        (np.zeros((49, 8, 8, 1), np.uint8), None, ["49", "50"]),
        (np.zeros((60, 8, 8, 1), np.uint8), np.zeros(59, np.int32), ["(59,)", "(60,)"]),
    ],
)
def test_unfit_samples_are_refused_in_one_sentence(dataset, extractor, images, label, words):
    with pytest.raises(UserError) as caught:
        report.judge(images, label, dataset, extractor, SETTINGS)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("name", ["train", "held_out"])
def test_too_little_data_is_refused(dataset, extractor, name):
    little = dataclasses.replace(dataset, **{name: part(getattr(dataset, name), slice(0, 40))})
    with pytest.raises(UserError, match=r"40.*at least 50"):
        report.judge(np.zeros((60, 8, 8, 1), np.uint8), None, little, extractor, SETTINGS)
