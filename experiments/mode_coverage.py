"""Does diffusion cover more modes than a GAN? Train each on stacked digits, sample, and count: one table.

    python experiments/mode_coverage.py --out=runs/mode_coverage

For every variant and seed this runs `diffusion-jax train` and `diffusion-jax sample` in OUT/VARIANT-seedS, has the
digits' classifier say which mode each sample is of (`evaluation/modes.py`) and keeps the row in OUT/VARIANT-seedS.json.
What has its row already is not run again: one of as many samples, at the last step of the same config, which stand in
the row. An interrupted training goes on where it stopped. All variants are shown the same training images in the same
order. Mean and standard deviation over the seeds go to OUT/table.md.

Mirrors the table on StackedMNIST of Huang et al. 2024 (R3GAN), on 8x8 digits, with VAE and diffusion beside the GANs.
"""

import itertools
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import app, flags

from diffusion_jax import data, files, plugs
from diffusion_jax.cli import arguments, drawing, runtime
from diffusion_jax.cli.workdir import check_config, completed, differences, plain
from diffusion_jax.errors import RunError, UserError, require
from diffusion_jax.evaluation import modes
from diffusion_jax.settings import DataSettings


class Variant(NamedTuple):
    """A row of the table: its title, the config's family, and the flags that change this one's config."""

    title: str
    family: str
    changes: tuple[str, ...] = ()


NON_SATURATING = "--config.family.loss=non_saturating"
VARIANTS = {
    "gan": Variant("GAN, non-saturating", "gan", (NON_SATURATING, "--config.family.regularisers=")),
    "gan_r1_r2": Variant("GAN, non-saturating, R1 + R2", "gan", (NON_SATURATING,)),
    "rpgan_r1_r2": Variant("RpGAN, R1 + R2", "gan"),
    "vae": Variant("VAE", "vae"),
    "diffusion": Variant("diffusion", "diffusion"),
    "transformer": Variant("autoregressive transformer", "transformer"),
    "maskgit": Variant("MaskGIT", "transformer-maskgit"),
}
COLUMNS = {
    "covered": ("modes of 1,000", ".1f"),
    "kl": ("KL to uniform, nats", ".3f"),
    "frechet_ratio": ("Fréchet distance over the real floor", ".2f"),
}
"""Entry of a row -> its title in the table, and how it is printed."""

CONFIG = Path(__file__).parents[1] / "configs" / "stacked_digits.py"
OUT = flags.DEFINE_string("out", None, "the directory to write, made where it is not there", required=True)
CHOSEN = flags.DEFINE_list("variants", list(VARIANTS), "which rows")
SEEDS = flags.DEFINE_integer("seeds", 3, "runs a variant, of seeds 0, 1, ...", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", None, "of training; the config's where left out", lower_bound=1)
SAMPLES = flags.DEFINE_integer("samples", 25_600, "images a run", lower_bound=1)


def main(argv: list[str]) -> None:
    """Measure every run that has no row yet, and write the table."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the command underneath is ended, too
    if argv[1:]:
        sys.exit(f"{argv[1]!r} is no flag; write --out=DIR.")
    out = Path(OUT.value)
    try:
        require(bool(CHOSEN.value), "--variants", "", f"must name at least one of {', '.join(VARIANTS)}")
        for name in CHOSEN.value:
            require(name in VARIANTS, "--variants", name, plugs.suggest(name, VARIANTS))
        files.check_can_write("--out", out)
        runtime.prepare()
        rows, failures = measure(out)
        table = render(rows, real(SAMPLES.value))
    except UserError as error:
        sys.exit(str(error))
    files.write_whole(out / "table.md", table.encode())
    print(table)
    if failures:
        sys.exit("\n".join(failures))


def measure(out: Path) -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
    """The rows of all runs by variant, and a sentence for each run that failed; the others go on."""
    rows, failures = {name: [] for name in CHOSEN.value}, []
    for seed, name in itertools.product(range(SEEDS.value), CHOSEN.value):
        try:
            rows[name].append(row(out, name, seed))
        except RunError as error:
            failures.append(str(error))
    return rows, failures


# ---------------------------------------------------------------------------------------------- one run


def row(out: Path, name: str, seed: int) -> dict[str, Any]:
    """The row of one run: the one that was kept, or else measured now.

    Raises:
      UserError: where a run of this name was begun with another config, or has a row of one.
      RunError: where training or sampling fails.
    """
    workdir = out / f"{name}-seed{seed}"
    file, samples = workdir.with_suffix(".json"), workdir / "samples.npz"
    chosen = choices(name, seed)
    config = config_of(chosen)
    check_config(workdir, config, override=False)
    found = kept(file, config)
    if found:
        return found
    command("train", f"--workdir={workdir}", *chosen)
    evaluation = files.read_json(workdir / "evaluation.json")
    command("sample", f"--workdir={workdir}", f"--num_samples={SAMPLES.value}", f"--out={samples}")
    images, _ = drawing.read("samples", samples)
    found = modes.judge(images, modes.build_classifier()) | {"frechet_ratio": evaluation["frechet_ratio"]}
    found |= {"step": evaluation["step"], "config": config}
    files.write_json(file, found)
    return found


def kept(file: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The row in a file, if there is one of so many samples of the config's last step.

    Raises:
      UserError: where it is of another config.
    """
    found = files.read_json(file) if file.exists() else {}
    if "config" not in found:  # as rows were before they said what they are of
        return None
    fields = differences(completed(found["config"]), config)
    rule = f"its row is of another config: {'; '.join(fields)}; take another --out, or remove it"
    require(not fields, "--out", str(file), rule)
    fits = (found["num_samples"], found["step"]) == (SAMPLES.value, config["train"]["steps"])
    return found if fits else None


def choices(name: str, seed: int) -> list[str]:
    """The flags of `diffusion-jax train` that make the config of one run."""
    variant = VARIANTS[name]
    steps = [f"--config.train.steps={STEPS.value}"] if STEPS.value else []
    return [f"--config={CONFIG}:{variant.family}", f"--config.seed={seed}", *steps, *variant.changes]


def config_of(chosen: list[str]) -> dict[str, Any]:
    """The config that such flags make, as a workdir keeps it."""
    return plain(arguments.config_of(arguments.parse("train", arguments.define_config, chosen)))


def command(*argv: str) -> None:
    """Run `diffusion-jax` in a process of its own: its memory goes with it, and XLA's flags are set before jax starts.

    Raises:
      RunError: where it fails.
    """
    status = subprocess.run([sys.executable, "-m", "diffusion_jax", *argv], check=False).returncode
    if status:
        raise RunError(f"{shlex.join(['diffusion-jax', *argv])} ended with status {status}.")


# ---------------------------------------------------------------------------------------------- the table


def real(count: int) -> dict[str, Any]:
    """The row of `count` real images that no training saw, or of all of them where there are no more."""
    held_out = data.build(DataSettings(name="stacked_digits")).held_out.image[:count]
    return modes.judge(held_out, modes.build_classifier()) | {"frechet_ratio": 1.0}


def render(rows: Mapping[str, Sequence[Mapping[str, Any]]], reference: Mapping[str, Any]) -> str:
    """The table in Markdown: a line for each variant, then real images, then what the figures are of."""
    lines = [
        "| | runs | " + " | ".join(title for title, _ in COLUMNS.values()) + " |",
        "|---" * (2 + len(COLUMNS)) + "|",
    ]
    for name, runs in rows.items():
        cells = [spread([run[column] for run in runs], form) for column, (_, form) in COLUMNS.items()]
        lines.append(f"| {VARIANTS[name].title} | {len(runs)} | " + " | ".join(cells) + " |")
    cells = [format(reference[column], form) for column, (_, form) in COLUMNS.items()]
    lines.append("| real, held out | | " + " | ".join(cells) + " |")
    n, train = SAMPLES.value, config_of(choices(CHOSEN.value[0], seed=0))["train"]
    note = (
        f"Mean ± standard deviation over the runs: {train['steps']:,} steps of {train['batch_size']} images, then "
        f"{n:,} samples. Real: {reference['num_samples']:,} stacks of held-out digits. Of {n:,} uniform draws "
        f"{modes.expected_covered(n):.1f} modes and a KL of {modes.expected_kl(n):.3f} are to be expected."
    )
    return "\n".join([*lines, "", note, ""])


def spread(values: Sequence[float], form: str) -> str:
    """`"997.3 ± 1.2"`; the value alone where there is one, a dash where there is none."""
    if not values:
        return "-"
    mean = format(np.mean(values), form)
    return mean if len(values) == 1 else f"{mean} ± {format(np.std(values, ddof=1), form)}"


if __name__ == "__main__":
    app.run(main)
