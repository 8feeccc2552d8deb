"""Real processes and real signals: what is killed at any moment ends, once resumed, bit by bit where it would have."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from diffusion_jax.cli.main import main
from diffusion_jax.cli.run import open_run
from diffusion_jax.families import FAMILIES
from diffusion_jax.training import sharding
from diffusion_jax.training.checkpoint import Checkpoints, abstract_like
from tests.training import small

CONFIG = "tests/training/small.py"
ROOT = Path(__file__).parents[2]


def command(family):
    return [sys.executable, "-m", "diffusion_jax", "train", f"--config={CONFIG}:{family}"]


def steps(family):
    """How many a run has."""
    return small.get_config(family).train.steps


def start(workdir, family="diffusion"):
    environment = os.environ | {"XLA_FLAGS": "", "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "xla")}
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command(family), f"--workdir={workdir}"], cwd=ROOT, env=environment, **pipe)


def finish(workdir, family="diffusion"):
    process = start(workdir, family)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def wait_for(condition, process, seconds=120):
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.01)


def saved_steps(workdir):
    """Steps whose checkpoint is whole, by the names on disk alone."""
    return [int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()]


def final_state(workdir):
    """The last checkpoint, read back whole."""
    run = open_run(str(workdir))
    shapes = jax.eval_shape(run.trainer.init)
    checkpoints = Checkpoints(workdir)
    shardings = sharding.infer(shapes, run.mesh, run.settings.mesh)
    state = checkpoints.restore(abstract_like(shapes, shardings), checkpoints.steps()[-1])
    checkpoints.close()
    return jax.device_get(state)


@pytest.fixture(scope="module")
def never_interrupted(tmp_path_factory):
    """family -> (workdir, state at the end) of a run that nothing disturbed."""

    @functools.cache
    def run(family):
        workdir = tmp_path_factory.mktemp("whole") / "run"
        finish(workdir, family)
        return workdir, final_state(workdir)

    return run


def check_same(workdir, family, never_interrupted):
    reference_dir, reference = never_interrupted(family)
    state = final_state(workdir)
    assert int(state.step) == steps(family)
    jax.tree.map(np.testing.assert_array_equal, state, reference)
    rows, expected = (
        [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
        for directory in (workdir, reference_dir)
    )
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    losses, wanted = ({key: row[key] for key in row if key.endswith("loss")} for row in (rows[-1], expected[-1]))
    assert losses == wanted
    assert losses


def kill(process, workdir):
    """SIGKILL; what was whole stays."""
    kept = max(saved_steps(workdir))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.communicate()
    assert max(saved_steps(workdir)) >= kept


def saving(workdir):
    """Whether a checkpoint is being written, by the names on disk."""
    return bool(list((workdir / "checkpoints").glob("*tmp*")))


def test_killed_again_and_again(tmp_path, never_interrupted):
    """SIGKILL with checkpoints every 3 steps: in the middle of a save, and a while after one."""
    workdir = tmp_path / "run"
    for number, moment in enumerate(("while saving", "later")):
        process = start(workdir)
        before = max(saved_steps(workdir), default=0)
        wait_for(lambda: max(saved_steps(workdir), default=0) > before + 9 * number, process)  # noqa: B023
        if moment == "while saving":
            wait_for(lambda: saving(workdir), process)
        if moment == "later":
            time.sleep(0.3)
        kill(process, workdir)
    finish(workdir)
    check_same(workdir, "diffusion", never_interrupted)


def test_every_family_is_small_here():
    assert set(small.SMALL) == set(FAMILIES)


@pytest.mark.slow  # by default diffusion is killed, above, and every family resumes in tests/contracts
@pytest.mark.parametrize("family", [family for family in small.SMALL if family != "diffusion"])
def test_killed_while_saving(tmp_path, never_interrupted, family):
    """Once, which is what a family can spoil: something that changes and is not in the checkpoint."""
    workdir = tmp_path / "run"
    process = start(workdir, family)
    wait_for(lambda: max(saved_steps(workdir), default=0) > 9, process)
    wait_for(lambda: saving(workdir), process)
    kill(process, workdir)
    assert max(saved_steps(workdir)) < steps(family)
    finish(workdir, family)
    check_same(workdir, family, never_interrupted)


def test_asked_to_leave(tmp_path, never_interrupted):
    """SIGTERM: one last checkpoint, status 0, and a sentence that says how to go on; then the same end."""
    workdir = tmp_path / "run"
    process = start(workdir)
    wait_for(lambda: saved_steps(workdir), process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    last = max(saved_steps(workdir))
    assert f"saved at step {last}" in out
    assert f"diffusion-jax train --config={CONFIG}:diffusion" in out
    assert last < steps("diffusion")
    assert not (workdir / "evaluation.json").exists()
    finish(workdir)
    assert (workdir / "evaluation.json").exists()
    check_same(workdir, "diffusion", never_interrupted)


def test_a_contradicting_config_is_refused_and_override_keeps_the_old_one(tmp_path, capsys):
    workdir = tmp_path / "run"
    process = start(workdir)
    wait_for(lambda: saved_steps(workdir), process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    saved = (workdir / "config.json").read_bytes()

    changed = [*command("diffusion"), f"--workdir={workdir}", "--config.train.learning_rate=0.5"]
    again = changed[changed.index("train") :]
    assert main(again) == 2
    assert "train.learning_rate is 0.5, was" in capsys.readouterr().err
    assert (workdir / "config.json").read_bytes() == saved

    forced = subprocess.Popen([*changed, "--override"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    before = max(saved_steps(workdir))
    wait_for(lambda: max(saved_steps(workdir)) > before, forced)
    forced.kill()
    forced.communicate()
    assert json.loads((workdir / "config.before-0.json").read_text()) == json.loads(saved)
    assert json.loads((workdir / "config.json").read_text())["train"]["learning_rate"] == 0.5

    for network, word in (
        ("dit(patch=4,width=16,depth=1,heads=2)", "shape"),
        ("dit(width=32,depth=2,heads=2)", "absent"),
    ):
        state = sorted((path, path.stat().st_mtime_ns) for path in workdir.rglob("*.json"))
        assert main([*again, "--override", f"--config.family.network={network}"]) == 2
        refused = capsys.readouterr().err
        assert "is of another model" in refused
        assert word in refused
        assert sorted((path, path.stat().st_mtime_ns) for path in workdir.rglob("*.json")) == state
