"""Train a model, or go on with a run that was interrupted.

A workdir that holds checkpoints is continued from the newest; SIGTERM saves once more and leaves with status 0. At the
end stand a grid of samples, an evaluation against held-out images and the next command to try.
"""

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from diffusion_jax import files
from diffusion_jax.cli import arguments
from diffusion_jax.errors import UserError

if TYPE_CHECKING:
    from diffusion_jax.cli.run import Run
    from diffusion_jax.training.checkpoint import Checkpoints
    from diffusion_jax.training.logbook import Logbook
    from diffusion_jax.training.loop import Task
    from diffusion_jax.types import TrainState


def define(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """The command's flags."""
    arguments.define_config(values, argv)
    flags.DEFINE_string("workdir", None, "the directory of the run, made where it is not there", flag_values=values)
    flags.DEFINE_boolean(
        "override",
        False,
        "go on with a run under a config that differs from the one it was begun with",
        flag_values=values,
    )


def main(values: flags.FlagValues) -> None:
    """Run the command."""
    config = arguments.config_of(values)
    workdir = Path(arguments.required(values, "workdir"))
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir={workdir}: is a file, not a directory.")

    from diffusion_jax.training.preemption import Leave, Preemption

    preemption = Preemption()

    from diffusion_jax.cli import run as runs
    from diffusion_jax.cli import runtime
    from diffusion_jax.training.checkpoint import Checkpoints

    runtime.prepare()
    run = runs.assemble(config)
    keep_config(workdir, run.config, values.override)
    checkpoints = Checkpoints(workdir, run.settings.checkpoint)
    try:
        state, step = train(run, workdir, checkpoints, preemption)
        checkpoints.wait()
        if step < run.settings.train.steps:
            raise Leave
        with preemption.leaving_at_once():
            finish(run, workdir, state, step)
    except Leave:
        again = shlex.join(["diffusion-jax", *sys.argv[1:]])
        print(f"Asked to stop; {saved_at(checkpoints)}. The same command goes on from there:\n  {again}")
    finally:
        checkpoints.close()


def saved_at(checkpoints: "Checkpoints") -> str:
    """What there is to go on from."""
    steps = checkpoints.steps()
    return f"saved at step {steps[-1]}" if steps else "there was nothing to save yet"


def keep_config(workdir: Path, config: Mapping[str, Any], override: bool) -> None:
    """Write config.json, unless the run was begun with another config; with `override` the old one is kept beside it.

    Raises:
      UserError: naming the fields that contradict the saved config.
    """
    file = workdir / "config.json"
    if file.exists():
        saved = files.read_json(file)
        fields = differences(saved, config)
        if fields and not override:
            raise UserError(
                f"--workdir={workdir} was begun with another config: {'; '.join(fields)}; "
                "take another workdir, or go on under the new config with --override."
            )
        if fields:
            number = len(list(workdir.glob("config.before-override-*.json")))
            files.write_json(workdir / f"config.before-override-{number}.json", saved)
    files.write_json(file, config)


def differences(saved: Mapping[str, Any], config: Mapping[str, Any], path: str = "") -> list[str]:
    """`"train.steps is 10, was 20"` for every field in which two configs differ."""
    found = []
    for key in sorted({*saved, *config}):
        old, new = saved.get(key), config.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{path}{key}.")
        elif old != new:
            found.append(f"{path}{key} is {new!r}, was {old!r}")
    return found


def train(run: "Run", workdir: Path, checkpoints: "Checkpoints", preemption: Any) -> tuple["TrainState", int]:
    """Train to the end, or until asked to stop; the last step is saved either way. Returns (state, finished steps)."""
    from diffusion_jax.training import loop
    from diffusion_jax.training.logbook import Logbook

    settings = run.settings
    feed = run.feed()
    program = run.program(feed)
    start = (checkpoints.steps() or [0])[-1]
    if start:
        print(f"going on from step {start} in {workdir}", file=sys.stderr)
    state = checkpoints.restore(program.abstract, start) if start else program.init()

    with Logbook(workdir, start, settings.train.steps, settings.train.batch_size) as logbook:
        state, step = loop.run(
            program,
            feed,
            state,
            start,
            settings.train,
            frozen={},
            tasks=tasks(run, workdir, checkpoints, logbook),
            log=logbook.progress,
            stop=preemption.asked,
        )
    if step > start:
        checkpoints.save(state, step, {"examples": step * settings.train.batch_size, "config": run.config})
    return state, step


def tasks(run: "Run", workdir: Path, checkpoints: "Checkpoints", logbook: "Logbook") -> list["Task"]:
    """What is done on the way: checkpoints, sample grids, light evaluations."""
    from diffusion_jax.evaluation import report
    from diffusion_jax.training.loop import Task

    settings = run.settings
    judged = not report.too_small(run.dataset)

    def save(state: "TrainState", step: int) -> None:
        checkpoints.save(state, step, {"examples": step * settings.train.batch_size, "config": run.config})
        logbook.rest()

    def grid(state: "TrainState", step: int) -> None:
        draw_grid(run, workdir, state, step)
        logbook.rest()

    def judge(state: "TrainState", step: int) -> None:
        result = run.judge(run.trainer.weights(state, settings.sample.ema), light=True)
        logbook.write(step, {f"evaluate/{name}": row["value"] for name, row in result["metrics"].items()})
        logbook.rest()

    return [
        Task(every=settings.checkpoint.every, act=save),
        Task(every=settings.sample.every, act=grid),
        Task(every=settings.evaluate.every if judged else 0, act=judge),
    ]


def draw_grid(run: "Run", workdir: Path, state: "TrainState", step: int) -> Path:
    """Write WORKDIR/samples/STEP.png: a hundred images, the classes in columns."""
    from diffusion_jax.cli import pictures

    weights = run.trainer.weights(state, run.settings.sample.ema)
    images = run.sampler.draw(weights, run.settings.seed, run.sampler.labels(100), 100, run.options)
    file = workdir / "samples" / f"{step}.png"
    files.write_whole(file, pictures.png(images))
    return file


def finish(run: "Run", workdir: Path, state: "TrainState", step: int) -> None:
    """The last grid, the full evaluation, and what to try next."""
    from diffusion_jax.evaluation import report

    print(f"samples     {draw_grid(run, workdir, state, step)}")
    problem = report.too_small(run.dataset)
    if problem:
        print(f"not judged  {problem}")
    else:
        print(f"judging {run.settings.evaluate.num_samples} samples", file=sys.stderr)
        profile = run.settings.sample.ema
        result = {"step": step, "ema": profile} | run.judge(run.trainer.weights(state, profile))
        files.write_json(workdir / "evaluation.json", result)
        print(f"evaluation  {workdir / 'evaluation.json'}\n\n{report.render(result)}")
    print(f"\nNext:\n  diffusion-jax sample --workdir={workdir} --num_samples=100 --out=samples.png")
