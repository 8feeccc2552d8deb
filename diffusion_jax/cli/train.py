"""Train a model, or go on with a run that was interrupted.

A workdir that holds checkpoints is continued from the newest; SIGTERM saves once more and leaves with status 0. At the
end stand a grid of samples, an evaluation against held-out images and the next command to try.
"""

import shlex
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from absl import flags

from diffusion_jax import files
from diffusion_jax.cli import arguments
from diffusion_jax.training.preemption import Leave, Preemption

if TYPE_CHECKING:
    from diffusion_jax.cli.run import Run
    from diffusion_jax.data import Feed
    from diffusion_jax.training.checkpoint import Checkpoints
    from diffusion_jax.training.logbook import Logbook
    from diffusion_jax.training.loop import Program, Task
    from diffusion_jax.types import TrainState, Tree


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


def main(argv: Sequence[str]) -> None:
    """Run the command. Everything that can be wrong is found before the workdir is touched."""
    preemption = Preemption()
    values = arguments.parse("train", define, argv)
    config = arguments.config_of(values)
    workdir = Path(arguments.required(values, "workdir"))
    files.check_can_write("--workdir", workdir)

    from diffusion_jax.cli import run as runs
    from diffusion_jax.cli import runtime
    from diffusion_jax.cli.workdir import check_config, keep_config, saved_steps, tokenizer_record
    from diffusion_jax.training.checkpoint import Checkpoints

    runtime.prepare()
    run = runs.assemble(config)
    check_config(workdir, run.config, values.override)
    try:
        with preemption.leaving_at_once():
            run = run.thawed(tokenizer_record(workdir))
        feed = run.feed()
        program = run.program(feed)
        with files.locked(workdir), closing(Checkpoints(workdir, run.settings.checkpoint)) as checkpoints:
            start = (checkpoints.steps() or [0])[-1]
            if start:
                checkpoints.check(program.abstract, start)
            keep_config(workdir, run.config)
            state, step = train(run, workdir, feed, program, checkpoints, preemption)
            if step < run.settings.train.steps:
                raise Leave
            with preemption.leaving_at_once():
                finish(run, workdir, state, step)
    except Leave:
        steps = saved_steps(workdir)
        where = f"saved at step {steps[-1]}" if steps else "there was nothing to save yet"
        print(f"Asked to stop; {where}. The same command goes on from there:")
        print(f"  {shlex.join(['diffusion-jax', 'train', *argv])}")


def train(
    run: "Run", workdir: Path, feed: "Feed", program: "Program", checkpoints: "Checkpoints", preemption: Preemption
) -> tuple["TrainState", int]:
    """Train to the end, or until asked to stop; the last step is saved either way. Returns (state, finished steps)."""
    from diffusion_jax.training import loop
    from diffusion_jax.training.logbook import Logbook

    settings = run.settings.train
    start = (checkpoints.steps() or [0])[-1]
    if start:
        print(f"going on from step {start} in {workdir}", file=sys.stderr)
    state = checkpoints.restore(program.abstract, start) if start else program.init()
    frozen = run.for_training()
    with Logbook(workdir, start, settings.steps, settings.batch_size) as logbook:

        def log(step: int, metrics: dict[str, float]) -> None:
            logbook.progress(step, metrics, run.family.warnings(metrics))

        if start < settings.steps:
            if not logbook.bar:  # which says so itself
                print("compiling", file=sys.stderr, flush=True)
            program = compiled(program, feed, start, frozen)
            logbook.rest()
        state, step = loop.run(
            program,
            feed,
            state,
            start,
            settings,
            frozen=frozen,
            tasks=tasks(run, workdir, checkpoints, logbook),
            log=log,
            stop=preemption.asked,
        )
    if step > start:
        save(run, checkpoints, state, step)
    return state, step


def compiled(program: "Program", feed: "Feed", start: int, frozen: "Tree") -> "Program":
    """The program, compiled now and not within the first step, so that its seconds are training's alone."""
    from diffusion_jax import tree

    count = tree.place(np.array(1, np.int32), program.abstract.step.sharding)
    lowered = program.advance.lower(program.abstract, feed.chunk(start, 1), count, frozen)
    return replace(program, advance=lowered.compile())


def save(run: "Run", checkpoints: "Checkpoints", state: "TrainState", step: int) -> None:
    """Save, unless the run is in a streak of updates that were not finite: the last checkpoint is the better one."""
    streak = int(state.skipped["in_a_row"])
    if streak:
        print(f"step {step} is not saved: the last {streak} updates were not finite", file=sys.stderr)
    else:
        about = {"examples": step * run.settings.train.batch_size, "config": run.config, "spec": asdict(run.spec)}
        about |= {"tokenizer": run.frozen.about} if run.tokenizer else {}
        checkpoints.save(state, step, about)


def tasks(run: "Run", workdir: Path, checkpoints: "Checkpoints", logbook: "Logbook") -> list["Task"]:
    """What is done on the way: checkpoints, sample grids, light evaluations."""
    from diffusion_jax.evaluation import report
    from diffusion_jax.training.loop import Task

    settings = run.settings
    judged = not report.too_small(run.dataset)

    def keep(state: "TrainState", step: int) -> None:
        save(run, checkpoints, state, step)
        logbook.rest()

    def grid(state: "TrainState", step: int) -> None:
        draw_grid(run, workdir, state, step)
        logbook.rest()

    def judge(state: "TrainState", step: int) -> None:
        found = run.glance(run.weights(state))
        logbook.write(step, {f"evaluate/{name}": value for name, value in found.items()})
        logbook.rest()

    return [
        Task(every=settings.checkpoint.every, act=keep),
        Task(every=settings.sample.every, act=grid),
        Task(every=settings.evaluate.every if judged else 0, act=judge),
    ]


def draw_grid(run: "Run", workdir: Path, state: "TrainState", step: int) -> Path:
    """Write WORKDIR/samples/STEP.png: a hundred images, see `Run.grid`."""
    from diffusion_jax.cli import pictures

    file = workdir / "samples" / f"{step}.png"
    files.write_whole(file, pictures.png(run.grid(run.weights(state), 100)))
    return file


def finish(run: "Run", workdir: Path, state: "TrainState", step: int) -> None:
    """The last grid, the full evaluation, and what to try next."""
    from diffusion_jax.cli.evaluate import render
    from diffusion_jax.evaluation import report

    print(f"samples     {draw_grid(run, workdir, state, step)}")
    problem = report.too_small(run.dataset)
    if problem:
        print(f"not judged  {problem}")
    else:
        print(f"judging {run.settings.evaluate.num_samples} samples", file=sys.stderr)
        result = run.evaluate(workdir, run.weights(state), run.settings.sample.ema, step)
        files.write_json(workdir / "evaluation.json", result)
        print(f"evaluation  {workdir / 'evaluation.json'}\n\n{render(result)}")
    if run.family.tokenizer:
        print(f"\nNext: a model over it, in whose config --config.family.tokenizer=workdir:{workdir}")
    else:
        print(f"\nNext:\n  diffusion-jax sample --workdir={workdir} --num_samples=100 --out=samples.png")
