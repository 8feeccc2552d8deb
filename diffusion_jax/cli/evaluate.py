"""Judge a trained model, or a file of samples, against the images that training never saw.

Fréchet distance, KID, precision, recall and label accuracy, each with a bootstrap interval and beside it the same
figure for as many real training images: the floor that nothing can be expected to beat by much.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from diffusion_jax import files
from diffusion_jax.cli import arguments
from diffusion_jax.errors import UserError


def define(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """The command's flags."""
    flags.DEFINE_string("workdir", None, "the directory of a trained run", flag_values=values)
    flags.DEFINE_string(
        "samples", None, "judge this .npz of `diffusion-jax sample` instead of sampling", flag_values=values
    )
    flags.DEFINE_string(
        "out",
        None,
        "the JSON to write; WORKDIR/evaluation.json where left out, SAMPLES.evaluation.json with --samples",
        flag_values=values,
    )
    flags.DEFINE_string("ema", None, "averaging profile, or none; the config's where left out", flag_values=values)
    flags.DEFINE_integer("step", None, "of the checkpoint; the newest where left out", flag_values=values)
    flags.DEFINE_integer(
        "likelihood",
        0,
        "measure bits per dimension on so many held-out images, too (families with a likelihood)",
        lower_bound=0,
        flag_values=values,
    )
    flags.DEFINE_integer(
        "reconstructions",
        0,
        "judge how near so many held-out images come to themselves, too (families with an encoder); at least 2",
        lower_bound=0,
        flag_values=values,
    )
    flags.DEFINE_boolean("json", False, "print the result as one JSON object in the last line", flag_values=values)


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    values = arguments.parse("evaluate", define, argv)
    workdir = arguments.required(values, "workdir")
    if values.samples and not Path(values.samples).is_file():
        raise UserError(f"--samples={values.samples}: there is no such file.")
    for flag in ("ema", "step", "likelihood", "reconstructions"):
        if values.samples and values[flag].present:
            raise UserError(f"--samples names images that are there already; leave out --{flag}.")
    if values.reconstructions == 1:
        raise UserError("--reconstructions=1: must be at least 2, or 0 for none.")
    default = f"{values.samples}.evaluation.json" if values.samples else Path(workdir) / "evaluation.json"
    out = Path(values.out or default)
    if values.out and (out.suffix != ".json" or not out.absolute().parent.is_dir()):
        raise UserError(f"--out={out}: must be a .json file in a directory that is there.")

    from diffusion_jax.cli import drawing, runtime
    from diffusion_jax.cli.model import load_weights
    from diffusion_jax.cli.run import open_run
    from diffusion_jax.evaluation import report

    runtime.prepare()
    judged = open_run(workdir)
    judged.check_measurable(values.likelihood, values.reconstructions)
    if values.samples:
        images, labels = drawing.read("samples", Path(values.samples))
        result = {"samples": values.samples} | judged.judge_samples(images, labels)
    else:
        problem = report.too_small(judged.dataset)
        if problem:
            raise UserError(problem)
        profile = values.ema or judged.settings.sample.ema
        weights, step = load_weights(judged, workdir, profile, values.step)
        result = judged.evaluate(Path(workdir), weights, profile, step)
        if values.likelihood:
            result["bits_per_dimension"] = judged.likelihood(weights, values.likelihood)
        if values.reconstructions:
            result["reconstruction"] = judged.reconstruction(weights, values.reconstructions)
    files.write_json(out, result)
    print(render(result), file=sys.stderr if values.json else sys.stdout)
    print(json.dumps(result) if values.json else f"\nsaved in {out}")


def render(result: dict[str, Any]) -> str:
    """What stands in an evaluation.json, as plain text."""
    from diffusion_jax.evaluation import cost, likelihood, reconstruction, report

    parts = [report.render(result)] if "metrics" in result else []
    rows = {"cost": cost, "bits_per_dimension": likelihood, "reconstruction": reconstruction}
    return "\n".join(parts + [of.render(result[name]) for name, of in rows.items() if name in result])
