"""Judge a trained model, or a file of samples, against the images that training never saw.

Fréchet distance, KID, precision, recall and label accuracy, each with a bootstrap interval and beside it the same
figure for as many real training images: the floor that nothing can be expected to beat by much.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

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
        "the JSON to write; WORKDIR/evaluation.json where left out, beside --samples where given",
        flag_values=values,
    )
    flags.DEFINE_string("ema", None, "averaging profile, or none; the config's where left out", flag_values=values)
    flags.DEFINE_integer("step", None, "of the checkpoint; the newest where left out", flag_values=values)
    flags.DEFINE_boolean("json", False, "print the result as one JSON object in the last line", flag_values=values)


def main(values: flags.FlagValues) -> None:
    """Run the command."""
    workdir = arguments.required(values, "workdir")
    if values.samples and not Path(values.samples).is_file():
        raise UserError(f"--samples={values.samples}: there is no such file.")
    default = Path(values.samples).with_suffix(".json") if values.samples else Path(workdir) / "evaluation.json"
    out = Path(values.out or default)
    if values.out and not out.absolute().parent.is_dir():
        raise UserError(f"--out={out}: there is no directory {out.parent}.")

    from diffusion_jax.cli import run, runtime, sample
    from diffusion_jax.evaluation import report

    runtime.prepare()
    judged = run.open_workdir(workdir)
    if values.samples:
        images, labels = sample.decode(Path(values.samples))
        result = {"samples": values.samples} | judged.judge_samples(images, labels)
    else:
        profile = values.ema or judged.settings.sample.ema
        weights, step = run.load_weights(judged, workdir, profile, values.step)
        result = {"step": step, "ema": profile} | judged.judge(weights)
    files.write_json(out, result)
    print(report.render(result), file=sys.stderr if values.json else sys.stdout)
    print(json.dumps(result) if values.json else f"\nsaved in {out}")
