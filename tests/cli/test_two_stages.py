"""A tokenizer is trained, then models over it: what they find in its workdir, and what they refuse to go on with."""

import dataclasses
import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest

from diffusion_jax import networks
from diffusion_jax.cli import train as command
from diffusion_jax.cli.main import main
from diffusion_jax.cli.model import load_weights, open_model, open_tokenizer
from diffusion_jax.cli.run import Run, open_run
from diffusion_jax.data import encoded
from diffusion_jax.errors import UserError
from diffusion_jax.networks import flops
from diffusion_jax.training.checkpoint import Checkpoints
from diffusion_jax.types import ImageSpec

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
    config.sample.batch_size = 64
    config.evaluate.num_samples = 50
    config.evaluate.bootstrap = 10
    return config
"""
CODEC = "--config.family.network=maskgit(channels=8,multipliers=(1,1),blocks=1)"
LATENT = ["--config.family.network=dit(patch=1,width=16,depth=1,heads=2)", "--config.sample.threshold=none"]
GPT = ["--config.family.network=gpt(width=16,depth=1,heads=2,multiple_of=1)"]
SHORT = "--config.train.steps=2"


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
    latents = ImageSpec(size=4, channels=3, num_classes=10)
    network = networks.build("network", LATENT[0].partition("=")[2], latents)
    codec = open_model(str(runs / "tokenizer")).family
    params = jax.eval_shape(codec.init, jax.random.key(0))[0]["autoencoder"]
    z = jax.ShapeDtypeStruct((1, 4, 4, 3), np.float32)
    decoder = 2.0 * flops.multiply_adds_of(codec.tokenizer.of_vectors, params, z)
    asked = found["sampling"]["evaluations"] * 2.0 * flops.multiply_adds(network, latents)
    np.testing.assert_allclose(found["sampling"]["flops"] - asked, decoder, rtol=0.05)


def test_a_channel_that_never_moves_is_left_at_that(runs, monkeypatch):
    """Whatever rounding makes of its deviation: it would be blown up with it."""
    codes = np.random.default_rng(0).normal(5.0, 2.0, (50, 4, 4, 3)).astype(np.float32)
    codes[..., 1] = np.float32(0.1) + np.float32(1e-8) * codes[..., 0]
    kept = encoded.EncodedSource(encoded=codes, label=None)
    monkeypatch.setattr(Run, "encoded", lambda run, frozen: kept)
    about = open_run(str(runs / "latent")).thawed(None).frozen.about
    assert about["scale"][1] == 1.0
    np.testing.assert_allclose(about["scale"][0], 1.0 / codes[..., 0].std(), rtol=1e-4)
    np.testing.assert_allclose(about["shift"], codes.astype(np.float64).mean((0, 1, 2)), rtol=1e-4)


def test_a_tokenizer_is_judged_by_its_reconstructions_and_the_codes_that_they_use(runs, tmp_path, capsys):
    """Counted here by hand: of 50 held-out digits 16 codes each; one is in use where it has 1 % of its even share."""
    assert main(["evaluate", f"--workdir={runs / 'tokenizer'}", f"--out={tmp_path / 'e.json'}"]) == 0
    shown, found = capsys.readouterr().out, json.loads((tmp_path / "e.json").read_text())["reconstruction"]
    assert found["n"] == 50
    assert found["psnr"] > 5.0
    assert 0.0 < found["ssim"] < 1.0
    assert found["frechet"] > 0.0
    run = open_run(str(runs / "tokenizer"))
    weights, _ = load_weights(run, str(runs / "tokenizer"), "main", None)
    tokens = run.family.tokenizer.encode(weights["autoencoder"], run.held_out(50)["image"], None)
    share = np.bincount(np.asarray(tokens).ravel(), minlength=60) / (50 * 16)
    assert found["codes"] == 60
    np.testing.assert_allclose(found["usage"], np.mean(share >= 0.01 / 60), rtol=1e-6)
    entropy = -np.sum(share * np.log(np.maximum(share, 1e-30)))
    np.testing.assert_allclose(found["perplexity"], np.exp(entropy), rtol=1e-4)
    assert f"{found['usage']:.1%} of 60 codes" in shown


# ---------------------------------------------------------------------------------------------- every kind of pair

PAIRS = {
    "residual-var": (
        "residual(codes=6,latents=3,scales=(1,2,4))",
        "transformer",
        "family.decoding=var family.network=var(width=16,depth=1,heads=2)",
    ),
    "fsq-maskgit": (
        "fsq(levels=(5,4,3))",
        "transformer",
        "family.decoding=maskgit family.network=maskgit(width=16,depth=1,heads=2) sample.steps=4",
    ),
    "kl-mar": (
        "kl(latents=2)",
        "transformer",
        "family.decoding=mar family.network=mar(width=16,depth=1,heads=2,buffer=2,mlp_width=16,mlp_depth=1) "
        "sample.steps=3 sample.solver_steps=3",
    ),
    "kl-unet": (
        "kl(latents=2)",
        "diffusion",
        "family.network=unet(channels=32,multipliers=(1,),blocks=1,attention=()) sample.threshold=none sample.steps=3",
    ),
}
"""name -> (bottleneck of the tokenizer, family of a model over it, what its config changes)."""


@pytest.mark.slow
@pytest.mark.parametrize("name", PAIRS)
def test_every_kind_of_model_goes_over_its_kind_of_tokenizer(train, tmp_path, name):
    """Two steps each, and then samples."""
    bottleneck, family, changes = PAIRS[name]
    flags = [f"--config.{change}" for change in changes.split()]
    assert train(tmp_path / "tokenizer", "tokenizer", CODEC, f"--config.family.bottleneck={bottleneck}", SHORT) == 0
    over = f"--config.family.tokenizer=workdir:{tmp_path / 'tokenizer'}"
    assert train(tmp_path / "model", family, over, *flags, SHORT) == 0
    assert ("scale" in record(tmp_path / "model")) == bottleneck.startswith("kl")
    assert main(["sample", f"--workdir={tmp_path / 'model'}", "--num_samples=3", f"--out={tmp_path / 'x.npz'}"]) == 0
    with np.load(tmp_path / "x.npz") as file:
        assert file["images"].shape == (3, 8, 8, 1)
        assert len(np.unique(file["images"].reshape(3, -1), axis=0)) == 3


# ---------------------------------------------------------------------------------------------- what is refused


def test_a_tokenizer_that_is_not_there_is_named(train, tmp_path, capsys):
    assert train(tmp_path / "x", "diffusion", f"--config.family.tokenizer=workdir:{tmp_path / 'none'}", *LATENT) == 2
    assert f"--config.family.tokenizer={tmp_path / 'none'}: there is no run here" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_tokenizer_is_found_from_another_directory_and_after_a_move(train, runs, tmp_path, monkeypatch, capsys):
    """Where training knew it by a relative path; a run of that name where the command is given is not taken for it."""
    (tmp_path / "a").mkdir()
    shutil.copytree(runs / "tokenizer", tmp_path / "a" / "first" / "tokenizer")
    shutil.copytree(runs / "tokens", tmp_path / "first" / "tokenizer")
    monkeypatch.chdir(tmp_path / "a")
    assert train("tokens", "transformer", "--config.family.tokenizer=workdir:first/tokenizer", *GPT, SHORT) == 0
    monkeypatch.chdir(tmp_path)
    sample = lambda run, out: main(["sample", f"--workdir={run}/tokens", "--num_samples=4", f"--out={out}.npz"])
    assert sample("a", "before") == 0
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "tokens").rename(tmp_path / "b" / "tokens")
    (tmp_path / "a" / "first" / "tokenizer").rename(tmp_path / "b" / "tokenizer")
    assert sample("b", "after") == 0
    with np.load("before.npz") as before, np.load("after.npz") as after:
        np.testing.assert_array_equal(before["images"], after["images"])
    shutil.rmtree(tmp_path / "b" / "tokenizer")
    shutil.rmtree(tmp_path / "first")
    assert sample("b", "gone") == 2
    assert "--config.family.tokenizer=first/tokenizer: there is no run here" in capsys.readouterr().err


def test_a_run_of_another_family_is_no_tokenizer(train, runs, tmp_path, capsys):
    assert train(tmp_path / "x", "diffusion", f"--config.family.tokenizer=workdir:{runs / 'tokens'}", *LATENT) == 2
    assert "is a run of the family transformer, which trains no tokenizer" in capsys.readouterr().err


def test_a_tokenizer_that_has_changed_is_refused(train, runs, tmp_path, capsys):
    """Trained anew under the same name: a model over the old one must not be sampled from with it."""
    shutil.copytree(runs / "tokenizer", tmp_path / "tokenizer")
    over = f"--config.family.tokenizer=workdir:{tmp_path / 'tokenizer'}"
    assert train(tmp_path / "tokens", "transformer", over, *GPT, SHORT) == 0
    shutil.rmtree(tmp_path / "tokenizer")
    again = [CODEC, "--config.family.bottleneck=fsq(levels=(5,4,3))", "--config.seed=1"]
    assert train(tmp_path / "tokenizer", "tokenizer", *again) == 0
    capsys.readouterr()
    assert main(["sample", f"--workdir={tmp_path / 'tokens'}", "--num_samples=4", f"--out={tmp_path / 'x.npz'}"]) == 2
    assert "are not those that this model was trained over" in capsys.readouterr().err
    assert train(tmp_path / "tokens", "transformer", over, *GPT, "--override") == 2


@pytest.mark.parametrize(
    ("changes", "fine"),
    [
        ({"error": "l2", "discriminator_start": 2, "balance": "fixed(weight=0.5)"}, True),
        ({"bottleneck": "fsq(levels=(4,5,3))"}, False),
        ({"precision": "bfloat16"}, False),
    ],
    ids=["losses", "bottleneck", "precision"],
)
def test_of_a_tokenizer_s_config_only_what_it_is_counts(runs, tmp_path, changes, fine):
    """Its parameters being the same: where stage one goes on with other losses, models over it stay."""
    shutil.copytree(runs / "tokenizer", tmp_path / "tokenizer")
    file = tmp_path / "tokenizer" / "config.json"
    config = json.loads(file.read_text())
    for name, value in changes.items():
        (config if name in config else config["family"])[name] = value
    file.write_text(json.dumps(config))
    model = open_model(str(runs / "tokens"))
    changed = open_tokenizer({"tokenizer": f"workdir:{tmp_path / 'tokenizer'}"}, model.spec)
    if fine:
        assert changed.load(model.mesh, record(runs / "tokens")).about["hash"] == record(runs / "tokens")["hash"]
    else:
        with pytest.raises(UserError, match="are not those that this model was trained over"):
            changed.load(model.mesh, record(runs / "tokens"))


def test_latents_have_no_range_to_be_kept_in(train, runs, tmp_path, capsys):
    over = f"--config.family.tokenizer=workdir:{runs / 'tokenizer'}"
    assert train(tmp_path / "x", "diffusion", over, LATENT[0]) == 2
    assert "sample.threshold = 'static': must be none" in capsys.readouterr().err
