"""Runs side by side: whether their figures compare, and one table of them.

A run is known by what it has written down: its config, what its checkpoint says of its images, and evaluation.json (see
`report.judge` and `cost`).
"""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.report import METRICS

Record = dict[str, Any]
"""A run's figures by name, plain numbers and strings; None for what there is not."""

DATA = ("name", "train_split", "held_out_split", "labels")
"""Fields of the config's `data` that say which images a model is meant to make, and how they are judged: without labels
by other features. How images are changed for training, by `flip` and `augment`, is a run's own choice, as its loss is:
the held-out images stay as they are."""
EFFORT = ("num_samples", "n", "num_train", "num_held_out", "subsets", "bootstrap")
"""Entries of an evaluation that say how many images and draws its figures are of."""


NUMBER = (int, float)
READ = {
    **dict.fromkeys(("step", *EFFORT, "cost.parameters.total", "cost.devices"), int),
    **dict.fromkeys(("ema", "features.name", "features.fingerprint", "cost.device"), str),
    **dict.fromkeys(("frechet_ratio", "metrics.frechet.value", "cost.training.flops", "cost.sampling.flops"), NUMBER),
    **dict.fromkeys(("cost.training.steps", "cost.training.images", "cost.sampling.batch_size"), int),
    **dict.fromkeys(("cost.sampling.evaluations", "cost.sampling.seconds"), NUMBER),
    **dict.fromkeys(("memorisation.samples", "memorisation.held_out"), NUMBER),
    "memorisation.exact_copies": int,
    "cost.parameters.players": Mapping,
    "cost.training.seconds": (*NUMBER, type(None)),
}
"""Entries of an evaluation.json that are read here, and their types; of every metric its figures, too."""


# ---------------------------------------------------------------------------------------------- may they be compared?


def problem(evaluation: Mapping[str, Any]) -> str:
    """What an evaluation.json lacks for being compared, such as `"its cost.device is 3"`, or "" where it is whole."""
    metrics = evaluation.get("metrics")
    asked = dict(READ)
    for name in METRICS if isinstance(metrics, Mapping) else ():
        if name in metrics:
            asked |= dict.fromkeys((f"metrics.{name}.value", f"metrics.{name}.floor"), NUMBER)
            asked |= dict.fromkeys((f"metrics.{name}.interval.0", f"metrics.{name}.interval.1"), NUMBER)
    for path, kind in asked.items():
        try:
            found = _entry(evaluation, path)
        except (LookupError, TypeError, ValueError):
            return f"it has no {path}"
        if not isinstance(found, kind) or isinstance(found, bool):
            return f"its {path} is {found!r}"
    return ""


def _entry(content: Any, path: str) -> Any:
    """What stands in nested mappings and lists under the names between the path's dots."""
    for name in path.split("."):
        content = content[int(name) if isinstance(content, list) else name]
    return content


def conditions(config: Mapping[str, Any], image_size: int, evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """What runs must have in common, by name: data, split and preprocessing, features, numbers of images.

    `image_size` is the side of the images themselves: in a config, 0 may say the same.
    """
    features = evaluation["features"]
    return {
        **{f"data.{name}": config["data"][name] for name in DATA},
        "data.image_size": image_size,
        **{f"evaluation.{name}": evaluation[name] for name in EFFORT},
        "evaluation.features.name": features["name"],
        "evaluation.features.fingerprint": features["fingerprint"],
        # The features know the training images; that the held-out ones are the same shows in what real images reach.
        "evaluation.metrics.frechet.floor": f"{evaluation['metrics']['frechet']['floor']:.4g}",
    }


def check(runs: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise `UserError` naming the first of the `conditions` in which two of the runs, by name, differ."""
    (first, expected), *others = runs.items()
    for name, found in others:
        for key, value in expected.items():
            if found[key] != value:
                raise UserError(
                    f"--workdirs: {first} and {name} do not compare: {key} is {value!r} for {first} and "
                    f"{found[key]!r} for {name}."
                )


# ---------------------------------------------------------------------------------------------- one run's figures


def record(
    name: str, family: str, evaluation: Mapping[str, Any], bits: Mapping[str, Any] | None, likelihood: str
) -> Record:
    """A run's figures.

    Args:
      name: of the run.
      family: its name.
      evaluation: the run's evaluation.json.
      bits: as `likelihood.summarise`, and `dequantised`; None where they are not measured.
      likelihood: what measured them, as the config has it.
    """
    metrics, cost = evaluation["metrics"], evaluation["cost"]
    row = {"run": name, "family": family, "step": evaluation["step"], "ema": evaluation["ema"]}
    for metric in METRICS:
        row |= _figure(metric, metrics.get(metric)) | {f"{metric}_floor": metrics.get(metric, {}).get("floor")}
    row["frechet_ratio"] = evaluation["frechet_ratio"]
    memory = evaluation["memorisation"]
    row |= {"distance_to_training": memory["samples"], "distance_to_training_floor": memory["held_out"]}
    row |= {"exact_copies": memory["exact_copies"]}
    row |= _figure("bits_per_dimension", bits)
    row |= {"bits_images": bits and bits["images"], "dequantised": bits and bits["dequantised"]}
    row["bits_bound"] = bits and (bits["bound"] or bool(likelihood))
    row["likelihood"] = likelihood if bits else None
    players = cost["parameters"]["players"]
    row["parameters"] = cost["parameters"]["total"]
    row["players"] = " + ".join(f"{name} {count}" for name, count in players.items())
    row |= {f"training_{key}": cost["training"][key] for key in ("steps", "images", "flops", "seconds")}
    row |= {f"sampling_{key}": cost["sampling"][key] for key in ("evaluations", "flops", "seconds", "batch_size")}
    return row | {"device": f"{cost['devices']} {cost['device']}"}


def _figure(name: str, row: Mapping[str, Any] | None) -> Record:
    low, high = (row or {}).get("interval") or (None, None)
    return {name: row and row["value"], f"{name}_low": low, f"{name}_high": high}


# ---------------------------------------------------------------------------------------------- the table

ROWS = {
    "family": "family",
    "step": "checkpoint's step",
    "ema": "averaging profile",
    "frechet": "Fréchet distance ↓",
    "frechet_ratio": "Fréchet distance / real floor ↓",
    "kid": "KID ↓",
    "precision": "precision ↑",
    "recall": "recall ↑",
    "label_accuracy": "label accuracy ↑",
    "distance_to_training": "distance to the nearest training image, not lower",
    "exact_copies": "exact copies of training images ↓",
    "bits_per_dimension": "bits per dimension ↓",
    "parameters": "parameters",
    "players": "parameters of each player",
    "training_images": "training: images seen",
    "training_flops": "training: FLOPs",
    "training_seconds": "training: seconds",
    "sampling_evaluations": "a sample: network evaluations",
    "sampling_flops": "a sample: FLOPs",
    "sampling_seconds": "a sample: seconds",
}
"""The table's rows: entry of a `Record` -> what stands in the first column."""


def to_csv(records: Sequence[Record]) -> str:
    """A line a run, under the names of `Record`; empty where there is no figure."""
    text = io.StringIO()
    writer = csv.DictWriter(text, records[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def to_markdown(records: Sequence[Record], about: Mapping[str, Any]) -> str:
    """The table, a column a run and one for real images, and notes on how to read it.

    Args:
      records: one a run.
      about: an evaluation of one of them; they agree in what is read here.
    """
    columns = [["", *ROWS.values()]]
    columns += [[record["run"], *(_cell(record, name) for name in ROWS)] for record in records]
    columns.append(["real floor", *(_floor(records[0], name) for name in ROWS)])
    return _aligned(columns) + "\n" + "".join(f"- {note}\n" for note in _notes(records, about))


def _aligned(columns: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose source can be read, too."""
    padded = [[cell.ljust(max(map(len, column))) for cell in column] for column in columns]
    padded = [[head, "-" * len(head), *cells] for head, *cells in padded]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in zip(*padded, strict=True))


def _cell(record: Record, name: str) -> str:
    low, high = record.get(f"{name}_low"), record.get(f"{name}_high")
    return show(record[name]) + ("" if low is None else f" ({show(low)} .. {show(high)})")


def _floor(record: Record, name: str) -> str:
    return "1" if name == "frechet_ratio" else show(record[f"{name}_floor"]) if f"{name}_floor" in record else ""


def show(value: float | str | None) -> str:
    """Four digits of a float, thousands of an int apart, - for nothing."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value


def _notes(records: Sequence[Record], about: Mapping[str, Any]) -> list[str]:
    n, features = f"{about['n']:,}", about["features"]
    notes = [
        f"{about['num_samples']:,} samples of each run; each figure is of {n} against {n} held-out images, mean of "
        f"{about['subsets']} draws, with the 95 % interval of one draw. Real floor: {n} real training images in their "
        "place; of label accuracy and the distance to training images, the held-out images.",
        f"Features: {features['name']} ({features['fingerprint']}).",
    ]
    for record in records:
        if record["bits_per_dimension"] is not None:
            what = "with uniform noise of one grey level" if record["dequantised"] else "discrete, not dequantised"
            by = "an upper bound," if record["bits_bound"] else "exact,"
            by = f"an upper bound in the mean, by {record['likelihood']}," if record["likelihood"] else by
            notes.append(
                f"Bits per dimension of {record['run']}: {by} of {record['bits_images']:,} held-out images, given the "
                f"labels that they have, {what}."
            )
    return [
        *notes,
        "FLOPs are 2 a multiply-add of products and convolutions; training's are those of the step as it is written, "
        "times the steps, and a penalty that is due in each k-th step (every=k) counts in all of them.",
        "Training seconds leave out compilation, checkpoints, grids and evaluations, and add up over interruptions. A "
        "sample's are those of all samples, after compilation, over their number: "
        + ", ".join(f"{r['run']} {r['sampling_batch_size']} at once on {r['device']}" for r in records)
        + ".",
    ]
