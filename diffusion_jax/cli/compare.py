"""Put runs side by side: one table (compare.md, compare.csv) and figures (samples.png, quality.png, losses.png).

Judgement and costs are those of each run's evaluation.json; bits per dimension are measured now, on the same held-out
images for all. Runs whose data, split, preprocessing or evaluation differ are refused.

samples.png shows the same labels of every run, quality.png the Fréchet distance against FLOPs a sample, losses.png
each run's losses; --steps adds steps.csv. A file that is there already and differs is kept beside the new one, as
NAME.before-N.
"""

import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from diffusion_jax import files
from diffusion_jax.cli import arguments
from diffusion_jax.errors import UserError, require

if TYPE_CHECKING:
    from diffusion_jax.cli.run import Run
    from diffusion_jax.types import Tree, Weights

SHOWN = 50
"""Images of each run in samples.png."""


def define(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """The command's flags."""
    flags.DEFINE_list("workdirs", None, "the directories of two or more trained and judged runs", flag_values=values)
    flags.DEFINE_string("out", None, "the directory to write into, made where it is not there", flag_values=values)
    flags.DEFINE_integer(
        "likelihood",
        1000,
        "measure bits per dimension on at most so many held-out images; 0 to leave them out",
        lower_bound=0,
        flag_values=values,
    )
    flags.DEFINE_list(
        "steps",
        [],
        "judge runs that sample in steps with these numbers of them, too, such as 5,10,20",
        flag_values=values,
    )
    flags.DEFINE_boolean("json", False, "print the table as one JSON object in the last line", flag_values=values)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What a run has written down, and the conditions of its figures."""

    workdir: str
    config: dict[str, Any]
    evaluation: dict[str, Any]
    conditions: dict[str, Any]


def main(argv: Sequence[str]) -> None:
    """Run the command. Nothing is computed before the runs are known to compare."""
    values = arguments.parse("compare", define, argv)
    check(values)

    from diffusion_jax.cli import runtime
    from diffusion_jax.cli.run import open_run
    from diffusion_jax.evaluation import comparison

    subjects = {name: read(workdir) for name, workdir in named(values.workdirs).items()}
    comparison.check({name: s.conditions for name, s in subjects.items()})
    runtime.prepare()
    opened = {name: open_run(subject.workdir) for name, subject in subjects.items()}
    sweeps = {name: in_steps(name, run, values.steps) for name, run in opened.items()}
    rule = "none of these runs samples in a number of steps that one may choose"
    require(not values.steps or any(sweeps.values()), "--steps", ",".join(values.steps), rule)
    found = {name: measure(name, s, opened[name], values.likelihood, sweeps[name]) for name, s in subjects.items()}

    out, records = Path(values.out), [f.record for f in found.values()]
    sweep = [row for f in found.values() for row in f.sweep]
    table = comparison.to_markdown(records, next(iter(subjects.values())).evaluation)
    keep(out / "compare.md", table.encode())
    keep(out / "compare.csv", comparison.to_csv(records).encode())
    if sweep:
        keep(out / "steps.csv", comparison.to_csv(sweep).encode())
    draw(out, subjects, found)
    print(table, file=sys.stderr if values.json else sys.stdout)
    print(json.dumps({"runs": records, "steps": sweep}) if values.json else f"saved in {out}")


def check(values: flags.FlagValues) -> None:
    """Raise `UserError` for what is wrong with the flags alone."""
    workdirs, out = arguments.required(values, "workdirs"), arguments.required(values, "out")
    rule = "must name two runs or more, each once"
    require(len({Path(w).resolve() for w in workdirs}) == len(workdirs) >= 2, "--workdirs", ",".join(workdirs), rule)
    fine = all(text.isdecimal() and int(text) > 0 for text in values.steps)
    require(fine, "--steps", ",".join(values.steps), "must be numbers from 1 on, such as 5,10,20")
    files.check_can_write("--out", Path(out))


# ---------------------------------------------------------------------------------------------- what is compared


def named(workdirs: Sequence[str]) -> dict[str, str]:
    """Workdirs by a name for each: their last parts, or the whole paths where two of those are alike."""
    short = [Path(workdir).resolve().name for workdir in workdirs]
    return dict(zip(short if len(set(short)) == len(short) else workdirs, workdirs, strict=True))


def read(workdir: str) -> Subject:
    """A run's config and evaluation.

    Raises:
      UserError: where there is none, or they are not whole, or not of a model at a checkpoint that is there.
    """
    from diffusion_jax.cli.workdir import checkpoints_of, completed, config_of
    from diffusion_jax.evaluation import comparison

    saved, file = config_of(workdir, "workdirs"), Path(workdir) / "evaluation.json"
    try:
        config = completed(saved)
    except (KeyError, TypeError):
        raise UserError(f"--workdirs = {workdir!r}: its config.json is not that of a run.") from None
    again = f"run `diffusion-jax evaluate --workdir={workdir}` first"
    require(file.is_file(), "--workdirs", workdir, f"has no evaluation.json; {again}")
    evaluation = files.read_json(file)
    require("cost" in evaluation, "--workdirs", workdir, f"its evaluation.json says nothing of costs; {again}")
    rule = "is a tokenizer's run, which has no samples; compare models over it"
    require("metrics" in evaluation or "reconstruction" not in evaluation, "--workdirs", workdir, rule)
    problem = comparison.problem(evaluation)
    require(not problem, "--workdirs", workdir, f"its evaluation.json is not that of a run: {problem}; {again}")
    step = evaluation["step"]
    there = (Path(workdir) / "checkpoints" / str(step)).is_dir()
    require(there, "--workdirs", workdir, f"its evaluation.json is of step {step}, which has no checkpoint; {again}")
    try:
        size = checkpoints_of(workdir, "workdirs").about(step)["spec"]["size"]
    except (KeyError, TypeError):
        raise UserError(f"--workdirs = {workdir!r}: its checkpoint does not say what the images look like.") from None
    conditions = comparison.conditions(config, size, evaluation)
    return Subject(workdir=workdir, config=config, evaluation=evaluation, conditions=conditions)


@dataclass(frozen=True, kw_only=True)
class Found:
    """What is known of a run.

    Attributes:
      record: its line of the table.
      sweep: its figures at other numbers of steps, a line each.
      images: u8[SHOWN,H,W,C], the classes in turn.
    """

    record: dict[str, Any]
    sweep: list[dict[str, Any]]
    images: Any


def in_steps(name: str, run: "Run", steps: Sequence[str]) -> dict[int, "Tree"]:
    """Options of sampling in each of these numbers of steps; none for a run whose config chooses no number.

    Raises:
      UserError: where the run cannot sample in one of them.
    """
    sampling = run.settings.sampling
    if not sampling.get("steps"):
        return {}
    try:
        return {int(count): run.family.sampling({**sampling, "steps": int(count)}) for count in steps}
    except UserError as error:
        raise UserError(f"--steps={','.join(steps)}: {name} cannot: {error}") from None


def measure(name: str, subject: Subject, run: "Run", likelihood: int, sweep: Mapping[int, "Tree"]) -> Found:
    """Measure what a run's evaluation does not say."""
    from diffusion_jax.cli.model import load_weights
    from diffusion_jax.evaluation import comparison

    print(f"measuring {name}", file=sys.stderr)
    evaluation = subject.evaluation
    weights, _ = load_weights(run, subject.workdir, evaluation["ema"], evaluation["step"])
    bits = run.likelihood(weights, likelihood) if likelihood and run.family.nll else None
    family = subject.config["family"]
    record = comparison.record(name, run.family.name, evaluation, bits, family.get("likelihood", ""))
    rows = run.sampler.labels(SHOWN)
    images = run.sampler.draw(weights, 0, rows, SHOWN, run.options)
    count = evaluation["num_samples"]
    rows = [{"run": name, "steps": n} | judged_with(run, weights, count, options) for n, options in sweep.items()]
    return Found(record=record, sweep=rows, images=images)


def judged_with(run: "Run", weights: "Weights", count: int, options: "Tree") -> dict[str, Any]:
    """The Fréchet distance and the cost of `count` samples with these options."""
    rows = run.sampler.labels(count)
    images = run.sampler.draw(weights, run.settings.seed, rows, count, options)
    metric = run.judge_samples(images, rows.get("label"))["metrics"]["frechet"]
    cost = run.sampling_cost(weights, options)
    return {
        "frechet": metric["value"],
        "frechet_low": metric["interval"][0],
        "frechet_high": metric["interval"][1],
        "sampling_evaluations": cost["evaluations"],
        "sampling_flops": cost["flops"],
    }


# ---------------------------------------------------------------------------------------------- what is written


def draw(out: Path, subjects: Mapping[str, Subject], found: Mapping[str, Found]) -> None:
    """Write the three figures; the plots only where there is matplotlib."""
    from diffusion_jax.cli import figures
    from diffusion_jax.training.logbook import lines

    keep(out / "samples.png", figures.side_by_side({name: f.images for name, f in found.items()}))
    curves = {name: list(lines(Path(s.workdir) / "metrics.jsonl")) for name, s in subjects.items()}
    try:
        quality = figures.quality([f.record for f in found.values()], [row for f in found.values() for row in f.sweep])
        losses = figures.losses(curves)
    except ImportError:  # in an environment that was made before there was `compare`
        print('no quality.png and losses.png: they need matplotlib, `pip install "matplotlib>=3.9"`.', file=sys.stderr)
        return
    keep(out / "quality.png", quality)
    keep(out / "losses.png", losses)


def keep(file: Path, content: bytes) -> None:
    """Write a file; what stood there and differs is kept beside it."""
    if file.exists() and file.read_bytes() != content:
        others = (file.with_name(f"{file.stem}.before-{number}{file.suffix}") for number in itertools.count())
        file.rename(next(other for other in others if not other.exists()))
    files.write_whole(file, content)
