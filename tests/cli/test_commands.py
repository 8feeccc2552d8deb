"""The way of a user: train, sample, evaluate, bench; the same seed, the same image."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusion_jax.cli.main import main

pytestmark = pytest.mark.usefixtures("quick_compilation")

TINY = [
    "--config=configs/digits.py:diffusion",
    "--config.family.network=dit(patch=4,width=32,depth=1,heads=2)",
    "--config.train.batch_size=16",
    "--config.train.log_every=10",
    "--config.sample.steps=3",
    "--config.sample.batch_size=64",
]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of 40 steps with everything that happens on the way."""
    directory = tmp_path_factory.mktemp("runs") / "tiny"
    flags = [
        "--config.train.steps=40",
        "--config.checkpoint.every=10",
        "--config.checkpoint.keep=2",
        "--config.sample.every=20",
        "--config.evaluate.every=20",
        "--config.evaluate.num_samples=60",
        "--config.evaluate.bootstrap=10",
    ]
    assert main(["train", *TINY, *flags, f"--workdir={directory}"]) == 0
    return directory


def sample(workdir, tmp_path, *flags):
    assert main(["sample", f"--workdir={workdir}", f"--out={tmp_path / 'x.npz'}", *flags]) == 0
    with np.load(tmp_path / "x.npz") as file:
        return dict(file)


def test_a_run_leaves_what_it_promises(workdir):
    names = {path.name for path in workdir.iterdir()}
    assert {"config.json", "metrics.jsonl", "checkpoints", "samples", "evaluation.json"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"30", "40"}
    assert {path.name for path in (workdir / "samples").iterdir()} == {"20.png", "40.png"}
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    training = [row for row in rows if "loss" in row]
    assert [row["step"] for row in training] == [10, 20, 30, 40]
    assert all(row["steps_per_second"] > 0 for row in training)
    assert [row["step"] for row in rows if "evaluate/frechet" in row] == [20, 40]
    report = json.loads((workdir / "evaluation.json").read_text())
    assert report["step"] == 40
    assert {"frechet", "kid", "precision", "recall", "label_accuracy"} <= set(report["metrics"])


def test_training_a_finished_run_trains_no_further(workdir, capsys):
    before = (workdir / "metrics.jsonl").read_bytes()
    config = json.loads((workdir / "config.json").read_text())
    flags = [
        f"--config.{section}.{field}={config[section][field]}"
        for section, field in [
            ("train", "steps"),
            ("checkpoint", "every"),
            ("checkpoint", "keep"),
            ("sample", "every"),
            ("evaluate", "every"),
            ("evaluate", "num_samples"),
            ("evaluate", "bootstrap"),
        ]
    ]
    assert main(["train", *TINY, *flags, f"--workdir={workdir}"]) == 0
    assert "frechet" in capsys.readouterr().out
    assert (workdir / "metrics.jsonl").read_bytes() == before


def test_samples_files_hold_what_they_promise(workdir, tmp_path):
    file = sample(workdir, tmp_path, "--num_samples=23")
    assert file["images"].dtype == np.uint8
    assert file["images"].shape == (23, 8, 8, 1)
    assert file["label"].dtype == np.int32
    np.testing.assert_array_equal(file["label"], np.arange(23) % 10)
    levels = np.rint(np.arange(17) * 255 / 16)
    assert np.isin(file["images"], levels).all()
    about = json.loads(str(file["about"]))
    assert about["step"] == 40
    assert about["seed"] == 0


def test_the_same_seed_gives_the_same_image_whatever_else_is_asked_for(workdir, tmp_path):
    reference = sample(workdir, tmp_path, "--num_samples=40")["images"]
    np.testing.assert_array_equal(sample(workdir, tmp_path, "--num_samples=7")["images"], reference[:7])
    np.testing.assert_array_equal(sample(workdir, tmp_path, "--num_samples=300")["images"][:40], reference)
    # Another batch size is another program, whose float32 sums may round otherwise.
    other = sample(workdir, tmp_path, "--num_samples=40", "--batch_size=16")["images"]
    assert np.mean(other != reference) < 1e-3
    assert np.mean(sample(workdir, tmp_path, "--num_samples=40", "--seed=1")["images"] != reference) > 0.1


def test_the_number_of_devices_changes_no_image(workdir, tmp_path):
    """This process has 8 devices; a fresh one has 1."""
    reference = sample(workdir, tmp_path, "--num_samples=40")["images"]
    command = [sys.executable, "-m", "diffusion_jax", "sample", f"--workdir={workdir}", f"--out={tmp_path / 'one.npz'}"]
    root = Path(__file__).parents[2]
    done = subprocess.run([*command, "--num_samples=40"], env=os.environ | {"XLA_FLAGS": ""}, cwd=root, check=False)
    assert done.returncode == 0
    assert np.mean(np.load(tmp_path / "one.npz")["images"] != reference) < 1e-3


def test_flags_of_sample_reach_the_sampler(workdir, tmp_path):
    plain = sample(workdir, tmp_path, "--num_samples=20")
    assert (sample(workdir, tmp_path, "--num_samples=20", "--label=3")["label"] == 3).all()
    changes = ("--steps=7", "--solver=ddim(eta=1)", "--guidance=3", "--ema=none", "--step=30", "--label=3")
    for change in changes:
        changed = sample(workdir, tmp_path, "--num_samples=20", change)
        assert (changed["images"] != plain["images"]).any(), change
    assert main(["sample", f"--workdir={workdir}", f"--out={tmp_path / 'x.png'}", "--num_samples=20"]) == 0
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.size == (10 * 9 * 6, 2 * 9 * 6)  # a line of one pixel between images


def test_a_custom_grid_brings_its_number_of_steps(workdir, tmp_path, capsys):
    """Four stops are four steps, where the config has three; a --steps that differs is refused."""
    file = sample(workdir, tmp_path, "--num_samples=2", "--grid=custom(times=(1.0,0.7,0.4,0.2))", "--trajectory")
    assert file["trajectory"].shape[1] == 5
    assert json.loads(str(file["about"]))["sample"]["steps"] == 4
    flags = ["--grid=custom(times=(1.0,0.7,0.4,0.2))", "--steps=7"]
    assert main(["sample", f"--workdir={workdir}", f"--out={tmp_path / 'x.npz'}", *flags]) == 2
    assert "sample.steps = 7: the grid custom(times=(1.0,0.7,0.4,0.2)) has 4 steps" in capsys.readouterr().err


def test_an_average_that_no_profile_allows_is_refused_by_its_flag(workdir, tmp_path, capsys):
    assert main(["sample", f"--workdir={workdir}", f"--out={tmp_path / 'x.npz'}", "--ema=posthoc(std=0.1)"]) == 2
    assert "--ema=posthoc(std=0.1): train.ema = 'main'" in capsys.readouterr().err


def test_evaluate_judges_a_run_and_a_file(workdir, tmp_path, capsys):
    assert main(["evaluate", f"--workdir={workdir}", "--json", f"--out={tmp_path / 'e.json'}"]) == 0
    printed = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert printed == json.loads((tmp_path / "e.json").read_text())
    sample(workdir, tmp_path, "--num_samples=60")
    capsys.readouterr()
    assert main(["evaluate", f"--workdir={workdir}", f"--samples={tmp_path / 'x.npz'}", "--json"]) == 0
    judged = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert judged["metrics"]["frechet"] == printed["metrics"]["frechet"]
    assert (tmp_path / "x.npz.evaluation.json").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"not a zip"])
def test_a_file_that_holds_no_samples_is_refused(workdir, tmp_path, capsys, content):
    (tmp_path / "bad.npz").write_bytes(content)
    assert main(["evaluate", f"--workdir={workdir}", f"--samples={tmp_path / 'bad.npz'}"]) == 2
    assert "bad.npz" in capsys.readouterr().err


def test_sample_refuses_what_the_run_does_not_have(workdir, tmp_path, capsys):
    for flag, word in [
        ("--guidance=inf", "sample.guidance"),
        ("--label=10", "[0, 10)"),
        ("--step=7", "30, 40"),
        ("--ema=x", "main"),
        ("--steps=0", "sample.steps"),
    ]:
        assert main(["sample", f"--workdir={workdir}", f"--out={tmp_path / 'y.npz'}", flag]) == 2
        assert word in capsys.readouterr().err
        assert not (tmp_path / "y.npz").exists()


def test_bench_prints_times(capsys):
    assert main(["bench", *TINY, "--steps=2", "--repetitions=2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert result["train_step_s"] > 0
    assert result["train_compile_s"] > 0
    assert result["sample_batch_s"] > 0
    assert result["parameters"] > 0


@pytest.fixture
def pictures(tmp_path):
    """600 grey images of 12x10 pixels in two classes, one file of them broken."""
    generator = np.random.default_rng(0)
    for number in range(600):
        kind = ("bright", "dark")[number % 2]
        directory = tmp_path / "pictures" / kind
        directory.mkdir(parents=True, exist_ok=True)
        low = 128 * (number % 2 == 0)
        Image.fromarray(generator.integers(low, low + 128, (10, 12), dtype=np.uint8)).save(directory / f"{number}.png")
    (tmp_path / "pictures" / "dark" / "broken.png").write_bytes(b"not a picture")
    return tmp_path / "pictures"


@pytest.mark.slow
def test_a_folder_streams_through_the_same_command(pictures, tmp_path, caplog):
    """The same losses whether the images live on the device or stream through grain."""
    flags = [
        "--config=configs/images.py:diffusion",
        f"--config.data.name=folder:{pictures}",
        "--config.data.image_size=8",
        "--config.data.flip=True",
        "--config.family.network=dit(patch=4,width=16,depth=1,heads=2)",
        "--config.train.batch_size=16",
        "--config.train.steps=4",
        "--config.train.log_every=2",
        "--config.sample.steps=2",
        "--config.evaluate.num_samples=50",
        "--config.evaluate.bootstrap=10",
    ]
    losses = []
    for name, megabytes in (("resident", 1024), ("stream", 0)):
        workdir = tmp_path / name
        assert main(["train", *flags, f"--config.data.device_megabytes={megabytes}", f"--workdir={workdir}"]) == 0
        rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        losses.append([row["loss"] for row in rows])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert "broken.png" in caplog.text
    pictures.rename(tmp_path / "elsewhere")  # a trained model is sampled without its data
    file = sample(tmp_path / "stream", tmp_path, "--num_samples=6")
    assert file["images"].shape == (6, 8, 8, 1)
    np.testing.assert_array_equal(file["label"], [0, 1, 0, 1, 0, 1])
