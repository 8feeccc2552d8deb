"""A model of labelled data that is told no labels: trained, sampled, judged; and runs that are older than the field."""

import json

import numpy as np
import pytest

from diffusion_jax.cli import arguments
from diffusion_jax.cli.main import main
from diffusion_jax.cli.run import assemble
from diffusion_jax.cli.workdir import completed, plain
from diffusion_jax.data.source import to_uint8

pytestmark = pytest.mark.usefixtures("quick_compilation")


CONFIG = [
    "--config=configs/digits.py:gan",
    "--config.data.labels=False",
    "--config.family.generator=resnet(width=8,multipliers=(1,),latent=4)",
    "--config.family.discriminator=resnet(width=8,multipliers=(1,),blocks=0)",
    "--config.family.regularisers=",
    "--config.train.steps=4",
    "--config.train.batch_size=16",
    "--config.sample.batch_size=64",
    "--config.evaluate.num_samples=60",
    "--config.evaluate.bootstrap=10",
]
FIGURES = {"frechet", "kid", "precision", "recall"}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "unconditional"
    assert main(["train", *CONFIG, f"--workdir={directory}"]) == 0
    return directory


def config():
    return arguments.config_of(arguments.parse("train", arguments.define_config, CONFIG))


def test_nothing_in_it_knows_a_label():
    """Neither the model, nor what it is asked for, nor the judgement: there are principal components instead."""
    run = assemble(config())
    assert run.spec.num_classes == 0
    assert run.sampler.labels(5) == {}
    assert set(run.held_out(3)) == {"image", "index"}
    judged = run.judge_samples(to_uint8(run.held_out(60)["image"], run.spec.levels), None)
    assert set(judged["metrics"]) == FIGURES
    assert "principal components" in judged["features"]["name"]


def test_a_config_without_the_field_is_one_with_labels():
    """As those of runs that were begun before there was such a field; they go on."""
    saved = plain(config())
    assert completed(saved)["data"]["labels"] is False
    del saved["data"]["labels"]
    assert completed(saved)["data"]["labels"] is True


@pytest.mark.slow
def test_it_is_trained_and_judged_without_labels(workdir):
    found = json.loads((workdir / "evaluation.json").read_text())
    assert set(found["metrics"]) == FIGURES
    about = json.loads((workdir / "checkpoints" / "4" / "about" / "metadata").read_text())
    assert about["spec"] == {"size": 8, "channels": 1, "num_classes": 0, "levels": 17}


@pytest.mark.slow
def test_it_is_sampled_without_labels(workdir, tmp_path, capsys):
    out = tmp_path / "x.npz"
    assert main(["sample", f"--workdir={workdir}", f"--out={out}", "--num_samples=3"]) == 0
    with np.load(out) as file:
        assert file["images"].shape == (3, 8, 8, 1)
        assert "label" not in file
    assert main(["sample", f"--workdir={workdir}", f"--out={out}", "--num_samples=3", "--label=3"]) == 2
    assert "--label=3" in capsys.readouterr().err
