"""Edits, trajectories, averages chosen afterwards, guidance by other networks: the commands that need no training."""

import json

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from diffusion_jax.cli.main import main

TINY = [
    "--config=configs/digits.py:diffusion",
    "--config.family.network=dit(patch=4,width=32,depth=1,heads=2)",
    "--config.family.classifier=dit(patch=4,width=32,depth=1,heads=2)",
    "--config.train.batch_size=16",
    "--config.train.log_every=10",
    "--config.train.steps=40",
    "--config.train.ema.main=power(std=0.1)",
    "--config.checkpoint.every=5",
    "--config.checkpoint.keep_every=5",
    "--config.sample.every=0",
    "--config.sample.steps=3",
    "--config.evaluate.every=0",
    "--config.evaluate.num_samples=50",
    "--config.evaluate.bootstrap=10",
]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "tiny"
    assert main(["train", *TINY, f"--workdir={directory}"]) == 0
    return directory


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Six held-out digits and a mask whose right half is to be made."""
    directory = tmp_path_factory.mktemp("pictures")
    digits = load_digits()
    images = np.rint(digits.images[2:20:3] * (255 / 16)).astype(np.uint8)[..., None]
    np.savez(directory / "images.npz", images=images, label=digits.target[2:20:3].astype(np.int32))
    mask = np.zeros((8, 8), np.uint8)
    mask[:, 4:] = 255
    Image.fromarray(mask).save(directory / "mask.png")
    return directory


def run(command, workdir, tmp_path, *flags):
    assert main([command, f"--workdir={workdir}", f"--out={tmp_path / 'x.npz'}", *flags]) == 0
    with np.load(tmp_path / "x.npz") as file:
        return dict(file)


def load(pictures):
    with np.load(pictures / "images.npz") as file:
        return dict(file)


def test_img2img_goes_from_the_image_to_a_sample(workdir, pictures, tmp_path):
    """Hardly noised it is the image; the further it is noised, the less."""
    images, flag = load(pictures)["images"].astype(float), f"--images={pictures / 'images.npz'}"
    made = [run("edit", workdir, tmp_path, "--edit=img2img", flag, f"--strength={s}") for s in (0.001, 0.3, 1.0)]
    distances = [np.abs(file["images"] - images).mean() for file in made]
    assert distances[0] < 1.0
    assert distances[0] < distances[1] < distances[2]
    np.testing.assert_array_equal(made[0]["label"], load(pictures)["label"])
    assert json.loads(str(made[1]["about"]))["edit"] == {
        "name": "img2img",
        "images": str(pictures / "images.npz"),
        "label": None,
        "strength": 0.3,
    }


def test_inpainting_keeps_what_is_known(workdir, pictures, tmp_path):
    flags = ["--edit=inpaint", f"--images={pictures / 'images.npz'}", f"--mask={pictures / 'mask.png'}", "--label=3"]
    one, two = (run("edit", workdir, tmp_path, *flags, "--resamplings=2", f"--seed={seed}") for seed in (0, 1))
    images = load(pictures)["images"]
    np.testing.assert_array_equal(one["images"][:, :, :4], images[:, :, :4])
    assert np.mean(one["images"][:, :, 4:] != images[:, :, 4:]) > 0.1
    assert np.mean(one["images"] != two["images"]) > 0.1
    assert (one["label"] == 3).all()


def test_translation_to_the_same_label_is_the_image(workdir, pictures, tmp_path):
    """There and back by the ODE, up to the solver's error; to another label it is not."""
    images, flag = load(pictures)["images"].astype(float), f"--images={pictures / 'images.npz'}"
    flags = ["--edit=translate", flag, "--steps=200", "--threshold=none"]
    same = run("edit", workdir, tmp_path, *flags)["images"]
    other = run("edit", workdir, tmp_path, *flags, "--label=7", "--guidance=20.0")["images"]
    assert np.abs(same - images).mean() < 8.0  # half a grey level of the digits' 17
    assert np.abs(other - images).mean() > 2.0 * np.abs(same - images).mean()


def test_interpolation_begins_and_ends_at_its_ends(workdir, pictures, tmp_path):
    ends = [
        run("sample", workdir, tmp_path, "--num_samples=1", "--label=4", f"--seed={s}")["images"][0] for s in (5, 6)
    ]
    between = run("edit", workdir, tmp_path, "--edit=interpolate", "--seeds=5,6", "--label=4", "--frames=7")["images"]
    assert between.shape == (7, 8, 8, 1)
    np.testing.assert_allclose(between[[0, -1]].astype(float), np.stack(ends), atol=16.0)  # rounded to one level
    assert np.abs(between[3].astype(float) - between[0]).mean() > 1.0
    for i, end in enumerate(ends):
        Image.fromarray(end[..., 0]).save(tmp_path / f"{i}.png")
    files = f"--images={tmp_path / '0.png'},{tmp_path / '1.png'}"
    flags = ["--edit=interpolate", files, "--label=4", "--steps=200", "--threshold=none", "--frames=3"]
    images = run("edit", workdir, tmp_path, *flags)["images"].astype(float)
    assert np.abs(images[[0, -1]] - np.stack(ends)).mean() < 8.0


def test_a_trajectory_ends_in_the_image(workdir, tmp_path):
    file = run("sample", workdir, tmp_path, "--num_samples=5", "--trajectory", "--steps=4")
    assert file["trajectory"].shape == (5, 5, 8, 8, 1)
    shown = np.rint(np.rint((np.clip(file["trajectory"][:, -1], -1, 1) + 1) * 8) * 255 / 16)
    np.testing.assert_allclose(shown, file["images"], atol=16)
    assert np.mean(shown == file["images"]) > 0.99
    assert 0.8 < file["trajectory"][:, 0].std() < 1.2  # noise
    assert (
        main(["sample", f"--workdir={workdir}", "--num_samples=3", "--trajectory", f"--out={tmp_path / 't.png'}"]) == 0
    )
    with Image.open(tmp_path / "t.png") as picture:
        assert picture.width * 3 == picture.height * 4  # 3 rows of 4 stops


def test_flags_of_sampling_reach_the_sampler(workdir, tmp_path):
    plain = run("sample", workdir, tmp_path, "--num_samples=10", "--guidance=20.0")["images"]
    for change in (
        "--grid=cosine",
        "--rules=rescaled(phi=1.0)",
        "--threshold=none",
        "--classifier=3.0",
        "--step=20",
        "--ema=posthoc(std=0.11)",
    ):
        changed = run("sample", workdir, tmp_path, "--num_samples=10", "--guidance=20.0", change)["images"]
        assert (changed != plain).any(), change
    kept = run("sample", workdir, tmp_path, "--num_samples=10", "--guidance=20.0", "--ema=posthoc(std=0.1)")["images"]
    assert np.mean(kept != plain) < 0.01  # the profile that was kept
    stops = run("sample", workdir, tmp_path, "--num_samples=2", "--grid=custom(times=(1.0,0.4))", "--steps=2")
    assert json.loads(str(stops["about"]))["sample"]["grid"] == "custom(times=(1.0,0.4))"


def test_likelihood_of_held_out_images(workdir, tmp_path, capsys):
    """Better than the uniform distribution over 17 levels it need not be after 40 steps, but of its order."""
    flags = ["--likelihood=20", "--json", f"--out={tmp_path / 'e.json'}"]
    assert main(["evaluate", f"--workdir={workdir}", *flags]) == 0
    row = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["bits_per_dimension"]
    assert row["images"] == 20
    assert row["interval"][0] < row["value"] < row["interval"][1]
    assert 1.0 < row["value"] < 3.0 * np.log2(17)


def test_autoguidance_away_from_an_earlier_checkpoint(workdir, tmp_path):
    plain = run("sample", workdir, tmp_path, "--num_samples=10")["images"]
    weak = [f"--weak_workdir={workdir}", "--weak_step=10"]
    pushed = run("sample", workdir, tmp_path, "--num_samples=10", *weak, "--autoguidance=2.0")["images"]
    assert (pushed != plain).any()
    both = run("sample", workdir, tmp_path, "--num_samples=10", *weak, "--autoguidance=2.0", "--guidance=3.0")["images"]
    assert (both != pushed).any()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], ["--edit is missing"]),
        (["--edit=paint"], ["--edit = 'paint'", "inpaint"]),
        (["--edit=img2img"], ["--images is missing"]),
        (["--edit=img2img", "--images=IMAGES", "--strength=1.5"], ["--strength = 1.5"]),
        (["--edit=img2img", "--images=IMAGES", "--mask=MASK"], ["--mask", "img2img does not read"]),
        (["--edit=img2img", "--images=nothing.npz"], ["nothing.npz"]),
        (["--edit=img2img", "--images=MASK"], ["--label is missing", "10 classes"]),
        (["--edit=img2img", "--images=MASK", "--label=10"], ["--label=10", "[0, 10)"]),
        (["--edit=inpaint", "--images=IMAGES"], ["--mask is missing"]),
        (["--edit=inpaint", "--images=IMAGES", "--mask=IMAGES"], ["--mask", "no picture"]),
        (["--edit=inpaint", "--images=IMAGES", "--mask=MASK", "--resamplings=0"], ["--resamplings = 0"]),
        (["--edit=translate", "--images=IMAGES", "--solver=ddpm"], ["sample.solver = 'ddpm'", "draws noise"]),
        (["--edit=interpolate", "--seeds=1"], ["--seeds = '1'", "two"]),
        (["--edit=interpolate", "--seeds=1,x"], ["--seeds = '1,x'"]),
        (["--edit=interpolate", "--images=IMAGES", "--label=1"], ["--images", "two images"]),
        (["--edit=interpolate"], ["--seeds"]),
        (["--edit=interpolate", "--seeds=1,2"], ["--label is missing"]),
    ],
)
def test_edit_refuses(workdir, pictures, tmp_path, capsys, flags, words):
    places = {"IMAGES": str(pictures / "images.npz"), "MASK": str(pictures / "mask.png")}
    for name, path in places.items():
        flags = [flag.replace(name, path) for flag in flags]
    assert main(["edit", f"--workdir={workdir}", f"--out={tmp_path / 'y.npz'}", *flags]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert all(word in lines[0] for word in words), lines[0]
    assert not (tmp_path / "y.npz").exists()


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--grid=custom(times=(1.0,0.4))", ["sample.steps = 3", "has 2 steps"]),
        ("--rules=intervall", ["sample.rules", "did you mean 'interval'"]),
        ("--threshold=dynamic(quantile=2.0)", ["sample.threshold", "quantile"]),
        ("--ema=posthoc(std=0.5)", ["--ema", "std"]),
        ("--ema=posthoc(std=0.005)", ["posthoc(std=0.005)", "40"]),
        ("--weak_workdir=nowhere", ["--weak_workdir=nowhere"]),
        ("--weak_step=5", ["--weak_step = 5", "--weak_workdir"]),
    ],
)
def test_sample_refuses(workdir, tmp_path, capsys, flag, words):
    assert main(["sample", f"--workdir={workdir}", f"--out={tmp_path / 'y.npz'}", flag]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert all(word in line for word in words), line
