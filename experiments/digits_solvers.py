"""Sample a trained model by every solver at several numbers of steps, and judge each: one table.

    python experiments/digits_solvers.py --workdir=runs/digits-diffusion

Each cell is the Fréchet distance of the samples over that of as many real training images, and the share recognised as
their label. Everything but solver and steps is as in the run's config. Mirrors Table 1 of Lu et al. 2022b, on the
digits. Cost: about 10 minutes on two CPU cores for 600 samples a cell.
"""

import sys

from absl import app, flags

from diffusion_jax.cli import runtime
from diffusion_jax.cli.model import load_weights
from diffusion_jax.cli.run import open_run
from diffusion_jax.diffusion.solvers import SOLVERS

WORKDIR = flags.DEFINE_string("workdir", None, "a trained run of family diffusion", required=True)
COUNT = flags.DEFINE_integer("num_samples", 600, "images a cell", lower_bound=50)
SEED = flags.DEFINE_integer("seed", 0, "of the noise")
GRID = flags.DEFINE_string("grid", None, "the time grid; the config's where left out")
STEPS = flags.DEFINE_list("steps", ["5", "10", "20", "50"], "numbers of steps")
ONLY = flags.DEFINE_list("solvers", [], "solvers, at their default options; all where left out")


def main(argv: list[str]) -> None:
    """Print a row for each solver."""
    if argv[1:]:
        sys.exit(f"{argv[1]!r} is no flag; write --workdir=DIR.")
    runtime.prepare()
    run = open_run(WORKDIR.value)
    weights, step = load_weights(run, WORKDIR.value, run.settings.sample.ema, None)
    rows = run.sampler.labels(COUNT.value)
    print(f"step {step} of {WORKDIR.value}\n")
    print("| solver | " + " | ".join(f"{steps} steps" for steps in STEPS.value) + " |")
    print("|---|" + "---|" * len(STEPS.value))
    for solver in ONLY.value or sorted(SOLVERS):
        cells = []
        for steps in STEPS.value:
            section = {**run.settings.sampling, "solver": solver, "steps": int(steps)}
            options = run.family.sampling(section | ({"grid": GRID.value} if GRID.value else {}))
            images = run.sampler.draw(weights, SEED.value, rows, COUNT.value, options)
            result = run.judge_samples(images, rows["label"], light=True)
            accuracy = result["metrics"]["label_accuracy"]["value"]
            cells.append(f"{result['frechet_ratio']:.2f}, {100 * accuracy:.1f} %")
        print(f"| `{solver}` | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    app.run(main)
