"""Augmentation: what is done to an image, what its label says of it, and that the network hears of it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage, stats

from diffusion_jax import families, rng
from diffusion_jax.cli import run as runs
from diffusion_jax.cli.main import main
from diffusion_jax.data import augment
from diffusion_jax.errors import UserError
from diffusion_jax.types import Context, ImageSpec

NETWORK = "ddpmpp(channels=32,multipliers=(1,),blocks=1,attention=(),augment=9)"


pytestmark = pytest.mark.usefixtures("quick_compilation")


def images(count, height=8, width=8, channels=3, seed=0):
    return jnp.asarray(np.random.default_rng(seed).uniform(-1, 1, (count, height, width, channels)), jnp.float32)


def keys(count, seed=0):
    return rng.example_keys(jax.random.key(seed), jnp.arange(count))


def change(**given):
    return augment.Change(**{name: jnp.float32(given.get(name, 0.0)) for name in augment.Change._fields})


def changed(image, **given):
    return np.asarray(jax.jit(augment.apply)(jnp.asarray(image, jnp.float32), change(**given)))


# ------------------------------------------------------------------------------------------ mirror images


def test_half_of_the_images_are_mirrored_each_by_its_own_key():
    image = np.random.default_rng(0).integers(0, 256, (400, 3, 4, 1), dtype=np.uint8)
    batch = {"image": jnp.asarray(image), "index": jnp.arange(400), "label": jnp.zeros(400, jnp.int32)}
    flipped = augment.flip(batch, rng.stream(0, "augment", 5))
    same = (np.asarray(flipped["image"]) == image).all((1, 2, 3))
    mirrored = (np.asarray(flipped["image"]) == image[:, :, ::-1]).all((1, 2, 3))
    assert (same ^ mirrored).all()
    assert 150 < mirrored.sum() < 250  # five standard deviations around 200
    assert flipped["image"].dtype == jnp.uint8
    assert flipped["label"] is batch["label"]

    part = {key: value[100:] for key, value in batch.items()}
    np.testing.assert_array_equal(augment.flip(part, rng.stream(0, "augment", 5))["image"], flipped["image"][100:])
    other = augment.flip(batch, rng.stream(0, "augment", 6))["image"]
    assert (np.asarray(other) != np.asarray(flipped["image"])).any()


@pytest.mark.parametrize(("name", "axis"), [("mirror_x", 1), ("mirror_y", 0)])
def test_a_mirror_image_is_exact_and_its_own_inverse(name, axis):
    image = images(1, 5, 6)[0]
    once = changed(image, **{name: 1.0})
    np.testing.assert_array_equal(once, np.flip(image, axis))
    np.testing.assert_array_equal(changed(once, **{name: 1.0}), image)


# ------------------------------------------------------------------------------------------ geometry


@pytest.mark.parametrize(("right", "down"), [(2, 0), (0, -3), (-1, 4), (7, 7)])
def test_whole_shifts_move_pixels_exactly(right, down):
    """By an eighth of 8 x 16 pixels times the shift; what comes in from outside is the image, mirrored."""
    image = np.asarray(images(1, 8, 16)[0])
    around = np.pad(image, ((8, 8), (8, 8), (0, 0)), mode="reflect")
    expected = around[8 - down : 16 - down, 8 - right : 24 - right]
    np.testing.assert_array_equal(changed(image, shift_x=right / 2.0, shift_y=down), expected)


@pytest.mark.parametrize("quarters", [1, 2, -1])
def test_quarter_turns_are_counterclockwise(quarters):
    image = images(1, 9, 9)[0]
    expected = np.rot90(image, quarters)
    np.testing.assert_allclose(changed(image, angle=quarters * np.pi / 2), expected, atol=2e-5)


def blob(x_length, y_length, angle=0.0, size=49):
    """A smooth ellipse, its first axis `angle` below the right."""
    y, x = np.mgrid[:size, :size] - size // 2
    along, across = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    return np.exp(-0.5 * ((along / x_length) ** 2 + (across / y_length) ** 2))[..., None]


@pytest.mark.parametrize("angle", [0.7, -2.0])
def test_turns_are_about_the_centre(angle):
    """A round blob there stays what it is, and a long one turns counterclockwise, y pointing down."""
    np.testing.assert_allclose(changed(blob(4, 4), angle=angle), blob(4, 4), atol=2e-3)
    np.testing.assert_allclose(changed(blob(4, 3), angle=angle), blob(4, 3, angle=-angle), atol=2e-3)


@pytest.mark.parametrize("w", [-1.5, 1.0, 2.0])
def test_scale_and_stretch_are_powers_of_two(w):
    """2^(0.2 w) (NVlabs/edm's scale_std and aniso_std): a Gaussian of so many pixels has other lengths after."""
    factor = 2.0 ** (0.2 * w)
    np.testing.assert_allclose(changed(blob(3, 4), scale=w), blob(3 * factor, 4 * factor), atol=2e-3)
    np.testing.assert_allclose(changed(blob(3, 4), stretch=w), blob(3 * factor, 4 / factor), atol=2e-3)


def test_stretch_along_a_slanted_axis():
    """Along the axis at `axis` above the right, y pointing down: a blob that lies there grows longer and thinner."""
    factor = 2.0**0.2
    expected = blob(4 * factor, 3 / factor, angle=-0.6)
    np.testing.assert_allclose(changed(blob(4, 3, angle=-0.6), stretch=1.0, axis=0.6), expected, atol=3e-3)


def test_the_order_of_changes():
    """Shift last: a blob in the middle is scaled, turned and stretched there, and then carried off."""
    moved = changed(blob(3, 4), scale=0.5, angle=0.4, stretch=0.7, axis=-0.3, shift_x=8 / 49, shift_y=-16 / 49)
    still = changed(blob(3, 4), scale=0.5, angle=0.4, stretch=0.7, axis=-0.3)
    np.testing.assert_allclose(moved[2:-2, 2:-2], np.roll(still, (-2, 1), (0, 1))[2:-2, 2:-2], atol=1e-4)
    turned_first = changed(changed(blob(2, 4), angle=0.9), stretch=1.5)
    np.testing.assert_allclose(changed(blob(2, 4), angle=0.9, stretch=1.5), turned_first, atol=5e-3)
    assert np.abs(changed(changed(blob(2, 4), stretch=1.5), angle=0.9) - turned_first).max() > 0.1


def test_between_pixels_it_is_keys_cubic_convolution():
    """Keys 1981: of a parabola, exact; of any image, scipy's convolution with the kernel's values at 1/2."""
    x = np.arange(12.0) / 12.0
    parabola = np.broadcast_to(x**2, (12, 12))[..., None]
    shifted = changed(parabola, shift_x=-0.3 * 8 / 12)
    np.testing.assert_allclose(shifted[0, 2:-3, 0], (x[2:-3] + 0.3 / 12) ** 2, atol=1e-5)

    image = 0.5 * np.asarray(images(1, 12, 12, 1)[0])
    half = ndimage.correlate1d(image, np.array([-1, 9, 9, -1]) / 16.0, axis=1, mode="mirror", origin=-1)
    np.testing.assert_allclose(changed(image, shift_x=-0.5 * 8 / 12), half, atol=1e-5)


def test_images_stay_in_range():
    """A cubic overshoots at an edge."""
    edge = np.where(np.arange(8) < 4, -1.0, 1.0) * np.ones((8, 1))
    moved = changed(edge[..., None], shift_x=0.5)
    assert moved.min() == -1.0
    assert moved.max() == 1.0


# ------------------------------------------------------------------------------------------ labels


def test_label_formulas():
    """The nine of NVlabs/edm's pipe: flips, scale, cos - 1 and sin of the turn, stretch along its axis, shifts."""
    given = dict(zip(augment.Change._fields, (1.0, 0.0, -0.8, 2.1, 1.3, -0.4, 0.25, -1.5), strict=True))
    stretch = 1.3 * np.array([np.cos(-0.4), np.sin(-0.4)])
    expected = [1, 0, -0.8, np.cos(2.1) - 1, np.sin(2.1), *stretch, 0.25, -1.5]
    np.testing.assert_allclose(augment.label_of(change(**given)), expected, atol=1e-6)


def test_probability_0_is_the_identity_to_the_bit():
    image = images(64)
    same, label = jax.jit(augment.transform)(image, keys(64), 0.0)
    np.testing.assert_array_equal(same, image)
    np.testing.assert_array_equal(label, np.zeros((64, 9)))


@pytest.mark.parametrize("probability", [0.12, 1.0])
def test_labels_are_zero_exactly_where_nothing_was_done(probability):
    image = images(512)
    other, label = jax.jit(augment.transform)(image, keys(512), probability)
    touched = (np.asarray(other) != np.asarray(image)).any((1, 2, 3))
    np.testing.assert_array_equal(touched, (np.asarray(label) != 0.0).any(1))
    # untouched: half are not mirrored, 1 - p/2 not turned upside down, (1 - p)^4 not moved; within 5 standard errors
    share = 0.5 * (1 - probability / 2) * (1 - probability) ** 4
    assert abs((~touched).mean() - share) <= 5 * np.sqrt(share * (1 - share) / 512)


def test_the_distribution_of_labels():
    """Rates within 5 standard errors; where something was done, the published densities (Kolmogorov and Smirnov)."""
    n, p = 20_000, 0.15
    drawn = jax.jit(lambda keys: rng.draw(keys, lambda key: augment.draw(key, p)))(keys(n))
    c = {name: np.asarray(value) for name, value in drawn._asdict().items()}
    rates = {name: np.mean(value != 0.0) for name, value in c.items()}
    expected = dict.fromkeys(("scale", "angle", "stretch", "shift_x", "shift_y"), p)
    expected |= {"mirror_x": 0.5, "mirror_y": p / 2, "axis": 0.5}
    for name, rate in expected.items():
        assert abs(rates[name] - rate) < 5 * np.sqrt(rate * (1 - rate) / n), name
    for name in ("scale", "stretch", "shift_x", "shift_y"):
        assert stats.kstest(c[name][c[name] != 0.0], "norm").pvalue > 1e-3, name
    for name in ("angle", "axis"):
        assert stats.kstest(c[name][c[name] != 0.0], stats.uniform(-np.pi, 2 * np.pi).cdf).pvalue > 1e-3, name
    np.testing.assert_array_equal(c["shift_x"] != 0.0, c["shift_y"] != 0.0)  # one decision, two directions
    apart = np.stack([c[name] for name in c if name != "shift_y"]) != 0.0
    off_diagonal = np.corrcoef(apart) - np.eye(len(apart))
    assert np.abs(off_diagonal).max() < 5 / np.sqrt(n)  # one change says nothing of another
    values = np.stack([c["scale"], c["stretch"], c["shift_x"], c["shift_y"]])
    assert np.abs(np.corrcoef(values) - np.eye(4)).max() < 5 * np.sqrt(1 / (p * n))


# ------------------------------------------------------------------------------------------ in a batch, in a run


def test_an_example_is_changed_by_its_own_key_alone():
    image, key = images(32), keys(32)
    other, label = jax.jit(augment.transform)(image, key, 0.5)
    order = np.random.default_rng(1).permutation(32)[:20]
    again, label_again = jax.jit(augment.transform)(image[order], key[order], 0.5)
    np.testing.assert_allclose(again, np.asarray(other)[order], atol=1e-6)
    np.testing.assert_array_equal(label_again, np.asarray(label)[order])


def test_a_batch_gains_its_labels():
    """Bytes become numbers in [-1, 1]; another step draws others; what else the batch has stays."""
    image = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 1), dtype=np.uint8)
    batch = {"image": jnp.asarray(image), "index": jnp.arange(16), "label": jnp.arange(16)}
    change = jax.jit(augment.EDMAugmentation(probability=0.5))
    first, second = (change(batch, rng.stream(0, "augment", step)) for step in (1, 2))
    assert first["augment"].shape == (16, 9)
    assert (np.asarray(first["augment"]) != np.asarray(second["augment"])).any()
    assert first["image"].dtype == jnp.float32
    np.testing.assert_array_equal(first["label"], batch["label"])
    untouched = jax.jit(augment.EDMAugmentation(probability=0.0))(batch, rng.stream(0, "augment", 1))
    np.testing.assert_allclose(untouched["image"], image / 127.5 - 1.0, atol=1e-6)


def test_the_label_reaches_the_network():
    """Where labels are zero, as where there are none, the weights that read them have no gradient; else they do."""
    spec = ImageSpec(size=8, channels=1, num_classes=0)
    family = families.build({"name": "diffusion", "network": NETWORK}, spec, "float32")
    assert family.augment == 9
    weights, extra = jax.jit(family.init)(jax.random.key(0))
    kernel = weights["denoiser"]["out"]["kernel"]
    weights["denoiser"]["out"]["kernel"] = 1e4 * kernel  # a network that has begun to learn
    batch = {"image": images(4, channels=1), "index": jnp.arange(4)}

    @jax.jit
    def gradient(batch):
        def loss(weights):
            ctx = Context(
                batch=batch,
                key=jax.random.key(1),
                common=jax.random.key(2),
                step=jnp.int32(0),
                extra=extra,
                ema={},
                frozen={},
            )
            return family.players[0].loss(weights, ctx)[0]

        return jax.grad(loss)(weights)["denoiser"]["augment"]["kernel"]

    for rest in ({}, {"augment": jnp.zeros((4, 9))}):
        np.testing.assert_array_equal(gradient(batch | rest), np.zeros((9, 32)))
    one = gradient(batch | {"augment": jnp.zeros((4, 9)).at[2, 5].set(1.0)})
    np.testing.assert_array_equal(np.abs(one).max(1) > 0.0, np.arange(9) == 5)


@pytest.mark.slow
def test_a_run_trains_and_samples_with_it(tmp_path, monkeypatch):
    """Through the command, less the evaluation, which is the same for all runs."""
    monkeypatch.setattr("diffusion_jax.evaluation.report.too_small", lambda dataset: "not in this test")
    flags = [
        "--config=configs/digits.py:diffusion",
        f"--config.family.network={NETWORK}",
        "--config.data.augment=edm(probability=0.5)",
        "--config.train.batch_size=16",
        "--config.train.steps=4",
        "--config.train.log_every=2",
        "--config.sample.steps=2",
        "--config.sample.batch_size=16",
    ]
    assert main(["train", *flags, f"--workdir={tmp_path / 'run'}"]) == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "loss" in row]
    assert [row["step"] for row in rows] == [2, 4]
    assert all(0.0 < row["loss"] < 10.0 and row["skipped"] == 0 for row in rows)
    assert (tmp_path / "run" / "samples" / "4.png").exists()


@pytest.mark.parametrize(
    ("text", "network", "words"),
    [
        ("", NETWORK, "must name an augmentation.*width 9"),
        ("edm", NETWORK.replace(",augment=9", ""), "would show in the samples.*augment=9"),
        ("edm", "dit(patch=4,width=32,depth=1,heads=2)", "would show in the samples"),
        ("edm", NETWORK.replace("=9", "=8"), "augment=9"),
        ("edn", NETWORK, "did you mean 'edm'"),
        ("edm(probability=1.5)", NETWORK, "probability must lie in"),
    ],
)
def test_network_and_augmentation_go_together(text, network, words):
    config = {"data": {"augment": text}, "family": {"name": "diffusion", "network": network}}
    with pytest.raises(UserError, match="data.augment.*" + words):
        runs.assemble(config)
