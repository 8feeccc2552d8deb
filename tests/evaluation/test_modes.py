import math

import numpy as np
import pytest
from scipy import stats

from diffusion_jax.data import stacked_digits
from diffusion_jax.data.source import to_uint8
from diffusion_jax.errors import UserError
from diffusion_jax.evaluation import features, modes, report
from diffusion_jax.settings import DataSettings, EvaluateSettings


def counts(**given):
    """n_m i64[1000], 0 but for m1=..., m2=... ."""
    count = np.zeros(1000, np.int64)
    for name, value in given.items():
        count[int(name[1:])] = value
    return count


@pytest.mark.parametrize(
    ("count", "covered", "kl"),
    [
        (np.full(1000, 26), 1000, 0.0),
        (counts(m7=25_600), 1, math.log(1000)),
        (np.arange(1000) % 2, 500, math.log(2)),
        (counts(m0=3, m999=1), 2, math.log(1000) - math.log(4) + 0.75 * math.log(3)),
    ],
    ids=["uniform", "one mode", "half of them", "two, three to one"],
)
def test_coverage_of_histograms_in_closed_form(count, covered, kl):
    assert modes.covered(count) == covered
    assert modes.kl_to_uniform(count) == pytest.approx(kl, abs=1e-12)


def test_the_divergence_is_scipys(generator):
    count = generator.integers(0, 5, 1000)
    assert modes.kl_to_uniform(count) == pytest.approx(stats.entropy(count, np.ones(1000)), rel=1e-12)


@pytest.mark.parametrize("draws", [500, 3000, 25_600])
def test_uniform_draws_cover_and_diverge_as_expected(generator, draws):
    """An empty mode has probability (1 - 1/1000)^N; 2 N KL is about chi-square of 999 degrees where N is large."""
    histograms = generator.multinomial(draws, np.full(1000, 1e-3), size=200)
    covered = [modes.covered(count) for count in histograms]
    kl = [modes.kl_to_uniform(count) for count in histograms]
    expected = 1000 * (1 - (1 - 1 / 1000) ** draws)
    assert modes.expected_covered(draws) == pytest.approx(expected, rel=1e-12)
    for values, mean in ((covered, expected), (kl, modes.expected_kl(draws))):
        assert np.mean(values) == pytest.approx(mean, abs=4 * np.std(values) / math.sqrt(200) + 1e-6)
    if draws == 25_600:
        assert modes.expected_kl(draws) == pytest.approx(999 / (2 * draws), rel=0.02)


def test_one_draw_covers_one_mode():
    assert modes.expected_covered(1) == pytest.approx(1.0)
    assert modes.expected_kl(1) == pytest.approx(math.log(1000))


def test_the_first_channel_counts_hundreds():
    count = modes.histogram(np.array([[3, 1, 4], [3, 1, 4], [0, 0, 9]], np.int32))
    np.testing.assert_array_equal(count, counts(m314=2, m9=1))


def test_channels_are_recognised_in_their_order(dataset, extractor):
    """The classifier knows the training digits by heart."""
    digit = {label: dataset.train.image[np.flatnonzero(dataset.train.label == label)[0]] for label in (3, 1, 4)}
    image = np.concatenate([digit[3], digit[1], digit[4]], axis=-1)[None]
    np.testing.assert_array_equal(modes.recognise(image, extractor), [[3, 1, 4]])
    result = modes.judge(np.repeat(image, 60, axis=0), extractor)
    assert (result["num_samples"], result["covered"]) == (60, 1)
    assert result["kl"] == pytest.approx(math.log(1000))


def test_real_held_out_stacks_are_recognised(dataset, extractor):
    """97.5 % of single held-out digits are (test_features.py)."""
    image, mode = stacked_digits.stack(dataset.held_out, 5000, stream=1)
    truth = np.stack([mode // 100, mode // 10 % 10, mode % 10], axis=1)
    assert np.all(np.mean(modes.recognise(image, extractor) == truth, axis=0) >= 0.95)
    floats, bytes_ = (modes.judge(each, extractor) for each in (image, to_uint8(image, 17)))
    assert floats == bytes_
    assert floats["covered"] == pytest.approx(modes.expected_covered(5000), abs=10)
    assert modes.expected_kl(5000) - 0.02 < floats["kl"] < 1.5 * modes.expected_kl(5000)


@pytest.mark.parametrize("shape", [(0, 8, 8, 3), (5, 8, 8, 1), (5, 16, 16, 3), (8, 8, 3)])
def test_other_images_are_refused(extractor, shape):
    with pytest.raises(UserError, match=r"shape of the samples = .*: must be \(N, 8, 8, 3\)"):
        modes.judge(np.zeros(shape, np.uint8), extractor)


def test_evaluation_falls_back_to_principal_components():
    """Training stacks in the place of samples reach the floor, which is that of other training stacks."""
    stacked = stacked_digits.build(DataSettings(name="stacked_digits"), "")
    space = features.build(stacked)
    assert "64 principal components" in space.name
    sample = to_uint8(stacked.train.image[:600], 17)
    result = report.judge(sample, None, stacked, space, EvaluateSettings(), light=True)
    assert "label_accuracy" not in result["metrics"]
    assert result["frechet_ratio"] == pytest.approx(1.0, abs=0.15)
    assert result["memorisation"]["exact_copies"] >= 1  # of those training stacks that are looked at
