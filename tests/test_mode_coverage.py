"""experiments/mode_coverage.py: which rows are kept and which are measured again, and the table."""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from diffusion_jax import files
from diffusion_jax.errors import RunError, UserError

SCRIPT = Path(__file__).parents[1] / "experiments" / "mode_coverage.py"
DIGITS = np.array([[3, 1, 4], [0, 0, 9]])


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("mode_coverage", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class ByBrightness:
    """A classifier that takes a channel of grey level 20 d for the digit d."""

    spec = SimpleNamespace(size=8)

    def predict(self, images):
        return images[:, 0, 0, 0].astype(int) // 20

    def about(self):
        return {"name": "brightness"}


@pytest.fixture
def experiment(script, monkeypatch, tmp_path):
    """The script with stubs for what takes long: training ends at once, samples are of two modes in equal parts.

    `calls` are the commands that were run, `ask` sets flags.
    """
    calls = []

    def command(name, workdir, *flags):
        calls.append(name)
        workdir = Path(workdir.removeprefix("--workdir="))
        if name == "train":
            if "--config.seed=7" in flags:
                raise RunError("diffusion-jax train ended with status 1.")
            steps = next(int(flag.split("=")[1]) for flag in flags if flag.startswith("--config.train.steps="))
            files.write_json(workdir / "evaluation.json", {"frechet_ratio": 2.5, "step": steps})
        else:
            count = int(flags[0].removeprefix("--num_samples="))
            images = np.broadcast_to(20 * np.tile(DIGITS, (count // 2, 1))[:, None, None], (count, 8, 8, 3))
            np.savez(workdir / "samples.npz", images=images.astype(np.uint8))

    def ask(**flags):
        for name, value in flags.items():
            monkeypatch.setattr(script, name, SimpleNamespace(value=value))

    ask(SAMPLES=60, STEPS=10, SEEDS=1, CHOSEN=["gan"])
    monkeypatch.setattr(script, "command", command)
    monkeypatch.setattr(script.modes, "build_classifier", ByBrightness)
    return SimpleNamespace(script=script, calls=calls, ask=ask, out=tmp_path)


def test_a_row_that_is_there_is_not_measured_again(experiment):
    first = experiment.script.row(experiment.out, "gan", 0)
    assert (first["num_samples"], first["covered"], first["frechet_ratio"]) == (60, 2, 2.5)
    assert first["kl"] == pytest.approx(math.log(500))
    assert experiment.script.row(experiment.out, "gan", 0) == first
    assert experiment.calls == ["train", "sample"]


def test_a_row_of_another_number_of_samples_or_another_step_is_measured_again(experiment):
    experiment.script.row(experiment.out, "gan", 0)
    experiment.ask(SAMPLES=80)
    assert experiment.script.row(experiment.out, "gan", 0)["num_samples"] == 80
    file = experiment.out / "gan-seed0.json"
    for change in ({"step": 9}, {"config": None}):
        row = json.loads(file.read_text()) | change
        file.write_text(json.dumps({name: value for name, value in row.items() if value is not None}))
        assert experiment.script.row(experiment.out, "gan", 0)["step"] == 10
    assert experiment.calls == 4 * ["train", "sample"]


def test_a_row_of_another_config_is_refused(experiment):
    """Also where its workdir is gone; and it stays as it is."""
    experiment.script.row(experiment.out, "gan", 0)
    before = (experiment.out / "gan-seed0.json").read_text()
    experiment.ask(STEPS=20)
    with pytest.raises(UserError, match=r"gan-seed0.json.*train\.steps is 20, was 10"):
        experiment.script.row(experiment.out, "gan", 0)
    assert (experiment.out / "gan-seed0.json").read_text() == before
    assert experiment.calls == ["train", "sample"]


def test_the_table_has_mean_and_deviation_of_the_runs_that_ended(experiment, monkeypatch):
    """Of three runs one fails, and says so; 60 uniform draws cover 1000 (1 - 0.999^60) modes."""
    monkeypatch.setattr(experiment.script.itertools, "product", lambda *_: [(0, "gan"), (7, "gan"), (1, "gan")])
    rows, failures = experiment.script.measure(experiment.out)
    assert failures == ["diffusion-jax train ended with status 1."]
    assert len(rows["gan"]) == 2
    rows["gan"][1]["covered"] = 4
    text = experiment.script.render(rows, {"covered": 58, "kl": 2.8, "frechet_ratio": 1.0, "num_samples": 60})
    (line,) = (line for line in text.splitlines() if line.startswith("| GAN"))
    assert line == "| GAN, non-saturating | 2 | 3.0 ± 1.4 | 6.215 ± 0.000 | 2.50 ± 0.00 |"
    assert "10 steps of 64 images, then 60 samples" in text
    assert f"{1000 * (1 - 0.999**60):.1f} modes" in text


@pytest.mark.slow
def test_the_whole_of_it_in_a_few_steps(tmp_path):
    flags = ["--variants=gan", "--seeds=1", "--steps=3", "--samples=60", f"--out={tmp_path}"]
    for _ in range(2):  # the second time nothing is left to do
        subprocess.run([sys.executable, str(SCRIPT), *flags], check=True)
    row = json.loads((tmp_path / "gan-seed0.json").read_text())
    assert (row["num_samples"], row["step"]) == (60, 3)
    assert 1 <= row["covered"] <= 60
    assert "| GAN, non-saturating | 1 |" in (tmp_path / "table.md").read_text()
