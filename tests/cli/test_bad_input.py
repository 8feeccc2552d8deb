"""Bad input ends with one sentence that names it, status 2, before anything is compiled or written."""

import json
import re
import subprocess
import sys

import pytest

from diffusion_jax.cli.main import COMMANDS, main
from diffusion_jax.diffusion.grids import GRIDS
from diffusion_jax.diffusion.guidance import GUIDANCE_RULES
from diffusion_jax.diffusion.solvers import SOLVERS
from diffusion_jax.diffusion.thresholding import THRESHOLDS

CONFIG = "--config=configs/digits.py:diffusion"


def complain(capsys, *argv):
    """The one line that a refused command prints."""
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert not captured.out
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].endswith(".")
    return lines[0]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--config=configs/digits.py"], ["needs a family", "diffusion"]),
        (
            ["--config=configs/digits.py:gan", "--config.family.loss=wasserstein", "--config.family.regularisers="],
            ["family.loss", "wasserstein", "gradient_penalty"],
        ),
        (["--config=configs/digits.py:gan", "--config.sample.temperature=0.0"], ["sample.temperature", "positive"]),
        (["--config=configs/digits.py:transformer", "--config.sample.top_k=3000000000"], ["sample.top_k", "2^31"]),
        (["--config=configs/digits.py:difusion"], ["difusion", "did you mean 'diffusion'"]),
        (["--config=configs/nothing.py:diffusion"], ["configs/nothing.py"]),
        (["--config=README.md:diffusion"], ["README.md"]),
        ([], ["--config is missing"]),
        ([CONFIG, "--config.train.step=3"], ["train.step", "did you mean 'steps'"]),
        ([CONFIG, "--config.trian.steps=3"], ["trian", "did you mean 'train'"]),
        ([CONFIG, "--config.train.steps=many"], ["train.steps", "many"]),
        ([CONFIG, "--config.train.steps=1e3"], ["train.steps", "1e3"]),
        ([CONFIG, "--config.train.steps=0"], ["train.steps = 0", "at least 1"]),
        ([CONFIG, "--config.train={'steps':3}"], ["config.train is a section"]),
        ([CONFIG, "--config.seed=-1"], ["seed = -1"]),
        ([CONFIG, "--config.precision=float16"], ["precision = 'float16'", "bfloat16"]),
        ([CONFIG, "--config.data.name=digitz"], ["data.name", "did you mean 'digits'"]),
        ([CONFIG, "--config.data.image_size=16"], ["data.image_size = 16", "8"]),
        ([CONFIG, "--config.data.name=folder:/nowhere"], ["/nowhere"]),
        ([CONFIG, "--config.family.name=gann"], ["family.name = 'gann'"]),
        ([CONFIG, "--config.family.network=dot"], ["family.network", "did you mean 'dit'"]),
        ([CONFIG, "--config.family.network=dit(patch=3)"], ["patch = 3", "image size 8"]),
        ([CONFIG, "--config.family.network=dit(width=130,heads=4)"], ["width", "130"]),
        ([CONFIG, "--config.family.network=dit(deep=4)"], ["no option 'deep'", "depth"]),
        ([CONFIG, "--config.family.network.depth=4"], ["config.family.network is 'dit"]),
        ([CONFIG, "--config.family.network=unet(channels=48)"], ["multiple of 32", "48"]),
        ([CONFIG, "--config.family.network=unet(multipliers=(1,1,1,1,1))"], ["8 pixels"]),
        ([CONFIG, "--config.family.schedule=cosin"], ["family.schedule", "did you mean 'cosine'"]),
        ([CONFIG, "--config.family.prediction=eps"], ["eps with rectified_flow", "t = 1"]),
        ([CONFIG, "--config.family.time_sampling=uniform(mean=1.0)"], ["no option 'mean'"]),
        ([CONFIG, "--config.family.weighting=min_snr(gamma=-1)"], ["gamma must be positive"]),
        ([CONFIG, "--config.family.label_dropout=1.0"], ["family.label_dropout = 1.0"]),
        ([CONFIG, "--config.sample.solver=hen"], ["sample.solver", "did you mean 'heun'"]),
        ([CONFIG, "--config.sample.solver=ddim(eta=2.0)"], ["eta must lie in [0, 1]"]),
        ([CONFIG, "--config.sample.steps=1001"], ["sample.steps = 1001", "1000"]),
        ([CONFIG, "--config.sample.ema=mian"], ["sample.ema = 'mian'", "main"]),
        ([CONFIG, "--config.train.batch_size=12"], ["batch_size", "12", "8"]),
        ([CONFIG, "--config.train.accumulate=3"], ["train.accumulate = 3", "64"]),
        ([CONFIG, "--config.train.optimizer=adamm"], ["train.optimizer", "did you mean 'adam"]),
        ([CONFIG, "--config.train.learning_rate_schedule=cosine"], ["learning_rate_schedule", "cosine"]),
        ([CONFIG, "--config.train.ema.main=warmup(decay=1.5)"], ["train.ema.main", "1.5"]),
        ([CONFIG, "--config.mesh.data=3"], ["mesh", "8 devices"]),
        ([CONFIG, "--config.checkpoint.keep=0"], ["checkpoint.keep = 0"]),
        (["--config", "configs/nothing.py:diffusion"], ["configs/nothing.py"]),
        (["--config", "configs/digits.py:diffusion", "--config.train.stepz", "3"], ["train.stepz", "steps"]),
        ([CONFIG, "--config.train.learning_rate=fast"], ["train.learning_rate=fast", "a number"]),
        ([CONFIG, "--config.data.flip=perhaps"], ["data.flip=perhaps", "true or false"]),
        ([CONFIG, "--config.data.train_split=x"], ["data.train_split = 'x'", "digits does not read"]),
        ([CONFIG, "--config.train.learning_rate=inf"], ["train.learning_rate = inf"]),
        ([CONFIG, "--config.train.optimizer=sgd(momentum='abc')"], ["cannot be trained"]),
        ([CONFIG, "--config.train.optimizer=adamw(mu_dtype='float33')"], ["float33"]),
        ([CONFIG, "--config.train.learning_rate_schedule=constant_schedule(value=0.1)"], ["train.learning_rate"]),
        ([CONFIG, "--config.family.network=dit(mlp_ratio=-1.0)"], ["mlp_ratio"]),
        ([CONFIG, "--config.family.network=unet(attention=('a',))"], ["attention"]),
        ([CONFIG, "--config.mesh.rules=(('kernel',('fsdp','fsdp')),)"], ["mesh.rules"]),
        ([CONFIG, "--config.mesh.rules=(('kernle',('fsdp',None)),)"], ["mesh.rules", "kernle"]),
        ([CONFIG, "--config.checkpoint.keep_every=700"], ["checkpoint.keep_every = 700", "multiple", "500"]),
        ([CONFIG, "--wrkdir=x"], ["wrkdir", "workdir"]),
        ([CONFIG, "extra"], ["'extra' is no flag"]),
    ],
)
def test_train_refuses(capsys, tmp_path, flags, words):
    workdir = tmp_path / "run"
    line = complain(capsys, "train", *flags, f"--workdir={workdir}")
    for word in words:
        assert word in line
    assert not workdir.exists()


@pytest.mark.parametrize("command", ["sample", "evaluate"])
def test_a_missing_workdir_is_named(capsys, tmp_path, command):
    out = [f"--out={tmp_path / 'x.npz'}"] if command == "sample" else []
    assert "/nowhere" in complain(capsys, command, "--workdir=/nowhere", *out)
    assert "--workdir is missing" in complain(capsys, command, *out)


def test_a_workdir_without_a_checkpoint_is_named(capsys, tmp_path):
    (tmp_path / "config.json").write_text("{")
    assert "config.json" in complain(capsys, "evaluate", f"--workdir={tmp_path}")
    (tmp_path / "config.json").write_text(json.dumps({"family": {"name": "diffusion"}}))
    assert "no checkpoint" in complain(capsys, "evaluate", f"--workdir={tmp_path}")


def test_a_workdir_that_is_a_file_is_refused(capsys, tmp_path):
    (tmp_path / "run").write_text("")
    assert "run is a file" in complain(capsys, "train", CONFIG, f"--workdir={tmp_path / 'run'}")


@pytest.mark.parametrize(("out", "word"), [("x.gif", ".npz or .png"), ("no/such/x.npz", "a directory that is there")])
def test_sample_refuses_an_impossible_out(capsys, tmp_path, out, word):
    assert word in complain(capsys, "sample", f"--workdir={tmp_path}", f"--out={tmp_path / out}")


def test_an_unknown_command_is_named(capsys):
    assert "did you mean 'train'" in complain(capsys, "trian")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_lists_the_flags(capsys, command):
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"diffusion-jax {command}" in text
    assert "--workdir" in text or "--config" in text


@pytest.mark.parametrize("command", ["sample", "edit"])
def test_help_names_the_rows_of_each_table(capsys, command):
    """As the tables have them, in their own flag's paragraph; and without waiting for jax."""
    tables = {"solver": SOLVERS, "grid": GRIDS, "rules": GUIDANCE_RULES, "threshold": THRESHOLDS}
    assert main([command, "--help"]) == 0
    _, *paragraphs = capsys.readouterr().out.split("\n  --")
    about = dict(re.split(r"\s+", paragraph, maxsplit=1) for paragraph in paragraphs)
    for flag, table in tables.items():
        assert re.split(r",\s+", about[flag].split("Rows: ")[1].strip()) == sorted(table)
    quick = "import sys; import diffusion_jax.cli.main as m; m.main(sys.argv[1:]); assert 'jax' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", quick, command, "--help"], check=False).returncode == 0


def test_help_lists_the_commands(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)


@pytest.mark.parametrize("workdir", ["pyproject.toml/x", "/proc/nothing/x"])
def test_a_workdir_that_cannot_be_made_is_refused(capsys, workdir):
    assert workdir.split("/")[-2] in complain(capsys, "train", CONFIG, f"--workdir={workdir}")


def test_a_samples_file_leaves_no_room_for_ema_and_step(capsys, tmp_path):
    (tmp_path / "x.npz").write_bytes(b"")
    line = complain(capsys, "evaluate", f"--workdir={tmp_path}", f"--samples={tmp_path / 'x.npz'}", "--step=3")
    assert "--step" in line
