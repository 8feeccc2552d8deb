"""A tokenizer is trained, then models over it: what they find in its workdir, and what they refuse to go on with."""

import dataclasses
import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest

from diffusion_jax.cli import train as command
from diffusion_jax.cli.main import main
from diffusion_jax.cli.model import load_weights, open_model
from diffusion_jax.cli.run import open_run
from diffusion_jax.data import encoded
from diffusion_jax.training.checkpoint import Checkpoints

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONFIG = """
from diffusion_jax.cli.config import base
def get_config(name):
    config = base(__file__, name, dict.fromkeys(("tokenizer", "diffusion", "transformer"), lambda config: None))
    config.data.name = "digits"
    config.train.batch_size = 16
    config.train.steps = 4
    config.train.log_every = 2
    config.train.ema.main = "constant(decay=0.5)"
    config.checkpoint.every = 2
    config.sample.every = config.evaluate.every = 0
    config.evaluate.num_samples = 50
    config.evaluate.bootstrap = 10
    return config
"""
CODEC = "--config.family.network=maskgit(channels=8,multipliers=(1,1),blocks=1)"
LATENT = ["--config.family.network=dit(patch=1,width=16,depth=1,heads=2)", "--config.sample.threshold=none"]
GPT = ["--config.family.network=gpt(width=16,depth=1,heads=2,multiple_of=1)"]


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """(workdir, family, *flags, judged) -> exit status; only what is `judged` ends with an evaluation."""
    file = tmp_path_factory.mktemp("configs") / "two_stages.py"
    file.write_text(CONFIG)

    def train(workdir, family, *flags, judged=False):
        with pytest.MonkeyPatch.context() as patch:
            if not judged:
                patch.setattr(command, "finish", lambda *args: None)
            return main(["train", f"--config={file}:{family}", f"--workdir={workdir}", *flags])

    return train


@pytest.fixture(scope="module")
def runs(train, tmp_path_factory):
    """A tokenizer of 4x4 codes of 3 digits, and of each kind a model over it."""
    directory = tmp_path_factory.mktemp("runs")
    assert train(directory / "tokenizer", "tokenizer", CODEC, "--config.family.bottleneck=fsq(levels=(5,4,3))") == 0
    over = f"--config.family.tokenizer=workdir:{directory / 'tokenizer'}"
    assert train(directory / "latent", "diffusion", over, *LATENT, judged=True) == 0
    assert train(directory / "tokens", "transformer", over, *GPT) == 0
    return directory


def record(workdir):
    checkpoints = Checkpoints(workdir)
    return checkpoints.about(checkpoints.steps()[-1])["tokenizer"]


@pytest.fixture(scope="module")
def vectors(runs):
    """What the tokenizer makes of all training images, f64[1198,4,4,3], asked of the tokenizer itself."""
    run = open_run(str(runs / "tokenizer"))
    weights, _ = load_weights(run, str(runs / "tokenizer"), "main", None)
    of = run.family.tokenizer
    return np.asarray(of.vectors(weights["autoencoder"], run.dataset.train.image, None), np.float64)


def test_the_checkpoint_says_which_tokenizer_and_how_its_latents_lie(runs, vectors):
    latent, tokens = record(runs / "latent"), record(runs / "tokens")
    assert latent["hash"] == tokens["hash"]
    assert latent["step"] == 4
    assert "shift" not in tokens
    flat = vectors.reshape(-1, 3)
    np.testing.assert_allclose(latent["shift"], flat.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(latent["scale"], 1.0 / flat.std(0), rtol=1e-4)


def test_the_tokenizer_stands_with_the_weights_and_is_not_trained(runs):
    """Nor saved again: the checkpoint has one player."""
    model = open_model(str(runs / "latent"))
    weights, step = load_weights(model, str(runs / "latent"), "main", None)
    assert set(weights) == {"denoiser", "tokenizer"}
    shapes = Checkpoints(runs / "latent").about(step)["shapes"]["params"]
    assert {name.split("/")[1] for name in shapes} == {"denoiser"}


def test_what_it_makes_of_the_images_was_kept_and_is_what_it_makes(runs, vectors):
    run = open_run(str(runs / "latent")).thawed(record(runs / "latent"))
    kept = run.encoded(run.frozen)
    np.testing.assert_allclose(kept.encoded, vectors, atol=1e-5)
    np.testing.assert_array_equal(kept.label, run.dataset.train.label)


@pytest.mark.slow
def test_training_on_what_was_kept_is_training_on_the_images(runs, train, tmp_path):
    """Which the step reads itself where they differ from time to time."""
    run = open_run(str(runs / "tokens")).thawed(record(runs / "tokens"))
    read, anew = run.feed(), dataclasses.replace(run, tokenizer=None).feed()
    take = lambda feed: run.trainer.step(
        run.trainer.init(), feed.batch(feed.chunk(0, 1), np.int32(0)), run.frozen.as_weights()
    )[1]
    np.testing.assert_allclose(take(read)["loss"], take(anew)["loss"], rtol=1e-5)


@pytest.mark.parametrize("name", ["latent", "tokens"])
def test_samples_are_images(runs, name, tmp_path):
    assert main(["sample", f"--workdir={runs / name}", "--num_samples=6", f"--out={tmp_path / 'x.npz'}"]) == 0
    with np.load(tmp_path / "x.npz") as file:
        assert file["images"].shape == (6, 8, 8, 1)
        assert len(np.unique(file["images"].reshape(6, -1), axis=0)) == 6


def test_a_run_that_was_stopped_ends_where_it_would_have_ended(runs, train, tmp_path):
    over = f"--config.family.tokenizer=workdir:{runs / 'tokenizer'}"
    assert train(tmp_path / "run", "diffusion", over, *LATENT, "--config.train.steps=2") == 0
    assert train(tmp_path / "run", "diffusion", over, *LATENT, "--override") == 0
    ours, theirs = (load_weights(open_model(str(d)), str(d), "none", 4)[0] for d in (tmp_path / "run", runs / "latent"))
    same = lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    jax.tree.map(same, ours["denoiser"], theirs["denoiser"])


def test_asked_to_leave_while_the_images_are_read_it_leaves_nothing_behind(runs, train, tmp_path, monkeypatch, capsys):
    """Neither a workdir nor half a file of codes."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    read = encoded.to_float

    def interrupted(images):
        os.kill(os.getpid(), signal.SIGTERM)
        return read(images)

    monkeypatch.setattr(encoded, "to_float", interrupted)
    over = f"--config.family.tokenizer=workdir:{runs / 'tokenizer'}"
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert train(tmp_path / "run", "transformer", over, *GPT) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "nothing to save yet" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    assert not list(cache.glob("**/encoded/*"))


def test_costs_count_the_latents_and_the_decoder(runs):
    """Sampling takes the network's evaluations and one run of the decoder."""
    found = json.loads((runs / "latent" / "evaluation.json").read_text())["cost"]
    assert set(found["parameters"]["players"]) == {"denoiser", "tokenizer"}
    assert found["sampling"]["flops"] > 0


# ---------------------------------------------------------------------------------------------- what is refused


def test_a_tokenizer_that_is_not_there_is_named(train, tmp_path, capsys):
    assert train(tmp_path / "x", "diffusion", f"--config.family.tokenizer=workdir:{tmp_path / 'none'}", *LATENT) == 2
    assert f"--config.family.tokenizer={tmp_path / 'none'}: there is no run here" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_run_of_another_family_is_no_tokenizer(train, runs, tmp_path, capsys):
    assert train(tmp_path / "x", "diffusion", f"--config.family.tokenizer=workdir:{runs / 'tokens'}", *LATENT) == 2
    assert "is a run of the family transformer, which trains no tokenizer" in capsys.readouterr().err


def test_a_tokenizer_that_has_changed_is_refused(train, runs, tmp_path, capsys):
    """Trained anew under the same name: a model over the old one must not be sampled from with it."""
    shutil.copytree(runs / "tokenizer", tmp_path / "tokenizer")
    over = f"--config.family.tokenizer=workdir:{tmp_path / 'tokenizer'}"
    assert train(tmp_path / "tokens", "transformer", over, *GPT, "--config.train.steps=2") == 0
    shutil.rmtree(tmp_path / "tokenizer")
    again = [CODEC, "--config.family.bottleneck=fsq(levels=(5,4,3))", "--config.seed=1"]
    assert train(tmp_path / "tokenizer", "tokenizer", *again) == 0
    capsys.readouterr()
    assert main(["sample", f"--workdir={tmp_path / 'tokens'}", "--num_samples=4", f"--out={tmp_path / 'x.npz'}"]) == 2
    assert "are not those that this model was trained over" in capsys.readouterr().err
    assert train(tmp_path / "tokens", "transformer", over, *GPT, "--override") == 2


def test_latents_have_no_range_to_be_kept_in(train, runs, tmp_path, capsys):
    over = f"--config.family.tokenizer=workdir:{runs / 'tokenizer'}"
    assert train(tmp_path / "x", "diffusion", over, LATENT[0]) == 2
    assert "sample.threshold = 'static': must be none" in capsys.readouterr().err
