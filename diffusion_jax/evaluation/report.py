"""The judgement: every figure beside the one that as many real training images reach, and a table of it all."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from diffusion_jax.data.source import Dataset
from diffusion_jax.errors import UserError, require
from diffusion_jax.evaluation import bootstrap, frechet, kid, memorisation
from diffusion_jax.evaluation.features import Features
from diffusion_jax.evaluation.precision_recall import precision_recall
from diffusion_jax.evaluation.real import choose, quantise
from diffusion_jax.settings import EvaluateSettings

LEAST = 50
"""Fewer images than this aren't judged."""
LIGHT_REAL = 2000
"""Real images of either part that a light judgement looks at, at most."""
DRAWS = 10


class Metric(NamedTuple):
    """Which direction is better, and the least and largest value that there can be."""

    better: str
    least: float = 0.0
    most: float = 1.0


METRICS = {
    "frechet": Metric("lower", most=np.inf),
    "kid": Metric("lower", least=-np.inf, most=np.inf),
    "precision": Metric("higher"),
    "recall": Metric("higher"),
    "label_accuracy": Metric("higher"),
}


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Images, what the extractor says of them, and what they were meant to show.

    Attributes:
      image: u8[N,H,W,C], on the data's grey levels.
      feature: f64[N,D].
      hit: f64[N], 1 where the predicted label is the given one; None where either is lacking.
    """

    image: np.ndarray
    feature: np.ndarray
    hit: np.ndarray | None


def judge(
    images: np.ndarray,
    label: np.ndarray | None,
    dataset: Dataset,
    features: Features,
    settings: EvaluateSettings,
    light: bool = False,
) -> dict[str, Any]:
    """Judge images against the held-out part of `dataset`, beside real training images judged in the same way.

    Every figure is of n images against n held-out ones, n = min(samples, training, held-out, settings.max_real), and
    the mean over `subsets` random draws of n; so is its floor. The floor of `label_accuracy` is that of the held-out
    images, because the classifier knows the training images by heart. The 95 % interval is that of one draw.

    Args:
      images: u8[N,H,W,C], N at least 50.
      label: i32[N], what each image was meant to show; None for data without labels.
      dataset: the real images, at least 50 in either part.
      features: built from the same `dataset`.
      settings: bounds on effort.
      light: without intervals, and with at most 2,000 real images of either part.

    Returns:
      A dictionary for JSON: `metrics` {name: {value, interval (low, high) or None, floor, better}}, `frechet_ratio`
      (value over floor), `memorisation` (see there), `features` {name, hash, held_out_accuracy}, `n`, `num_samples`,
      `num_train`, `num_held_out`, `subsets`, `bootstrap`.

    Raises:
      UserError: for images of another shape or type than the data's, or too few of any kind.
    """
    check(images, label, dataset)
    limit = min(settings.max_real, LIGHT_REAL) if light else settings.max_real
    real = [choose(source, limit) for source in (dataset.train, dataset.held_out)]
    train, held_out = (_look(source.image, source.label, features) for source in real)
    made = _look(images, label, features)
    n = min(limit, *(len(sample.image) for sample in (made, train, held_out)))
    resamplings = 0 if light else settings.bootstrap
    values, subsets = _figures(made, held_out, n)
    floors, _ = _figures(train, held_out, n)
    intervals = _intervals(made, held_out, n, resamplings, values) if resamplings else {}
    accuracy = None if held_out.hit is None else float(held_out.hit.mean())
    if "label_accuracy" in values:
        floors["label_accuracy"] = accuracy
    return {
        "metrics": {name: _row(name, value, intervals, floors) for name, value in values.items()},
        "frechet_ratio": values["frechet"] / max(floors["frechet"], 1e-12),
        "memorisation": memorisation.measure(made.image, held_out.image, train.image),
        "features": features.about() | {"held_out_accuracy": accuracy},
        "n": n,
        "num_samples": len(images),
        "num_train": len(train.image),
        "num_held_out": len(held_out.image),
        "subsets": subsets,
        "bootstrap": resamplings,
    }


def _row(name: str, value: float, intervals: dict[str, Any], floors: dict[str, float]) -> dict[str, Any]:
    better = METRICS[name].better
    return {"value": value, "interval": intervals.get(name), "floor": floors[name], "better": better}


def too_small(dataset: Dataset) -> str:
    """Why samples cannot be judged against `dataset`, as a sentence, or ""."""
    for name in ("train", "held_out"):
        count = len(getattr(dataset, name))
        if count < LEAST:
            return f"number of {name} images of {dataset.name} = {count}: a judgement needs at least {LEAST}."
    return ""


def check(images: np.ndarray, label: np.ndarray | None, dataset: Dataset) -> None:
    """Raise `UserError` unless the images (and labels) can be judged against `dataset`."""
    shape = dataset.spec.shape
    require(
        images.shape[1:] == shape, "shape of the samples", images.shape[1:], f"{dataset.name} has images of {shape}"
    )
    require(images.dtype == np.uint8, "type of the samples", str(images.dtype), "must be uint8")
    require(len(images) >= LEAST, "number of samples", len(images), f"must be at least {LEAST}")
    problem = too_small(dataset)
    if problem:
        raise UserError(problem)
    if label is not None:
        require(label.shape == (len(images),), "shape of the labels", label.shape, f"must be ({len(images)},)")
        classes = dataset.spec.num_classes
        inside = np.issubdtype(label.dtype, np.integer) and np.all((label >= 0) & (label < classes))
        require(inside, "labels", f"{label.dtype} {label[:3]}...", f"must be integers in [0, {classes})")


def _look(images: np.ndarray, label: np.ndarray | None, features: Features) -> Sample:
    image = quantise(images, features.spec)
    feature, predicted = features.describe(image)
    hit = None if label is None or predicted is None else (predicted == label).astype(np.float64)
    return Sample(image=image, feature=feature, hit=hit)


def _figures(sample: Sample, held_out: Sample, n: int) -> tuple[dict[str, float], int]:
    """Each figure, as the mean over draws of n of either, and the number of draws (1 where there is one only)."""
    generator = np.random.default_rng(0)
    sizes = len(sample.image), len(held_out.image)
    draws = 1 if sizes == (n, n) else DRAWS
    rows = []
    for _ in range(draws):
        i, j = (generator.permutation(size)[:n] for size in sizes)
        a, b = sample.feature[i], held_out.feature[j]
        precise, recalled = precision_recall(a, b)
        row = {"frechet": frechet.distance(a, b), "kid": kid.distance(a, b)}
        row |= {"precision": precise.mean(), "recall": recalled.mean()}
        if sample.hit is not None:
            row["label_accuracy"] = sample.hit[i].mean()
        rows.append(row)
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}, draws


def _intervals(
    sample: Sample, held_out: Sample, n: int, resamplings: int, values: dict[str, float]
) -> dict[str, tuple[float, float]]:
    """95 % intervals: both sets are drawn again, n of each with replacement, and each figure is taken again.

    For precision and recall the balls stay those of one draw without repetitions (an image that stands twice would
    shrink its own ball to nothing); which images fall inside is drawn again. On the digits that gives a standard
    deviation of 0.011, where 599 other digits give 0.014. The Fréchet distance's is too large instead: 0.28 for 0.17.
    """
    generator = np.random.default_rng(1)
    sizes = len(sample.image), len(held_out.image)
    i, j = (bootstrap.indices(generator, size, n, resamplings) for size in sizes)
    a, b = sample.feature, held_out.feature
    resampled = {
        "frechet": np.array([frechet.distance(a[s], b[h]) for s, h in zip(i, j, strict=True)]),
        "kid": kid.weighted(a, b, bootstrap.counts(i, sizes[0]), bootstrap.counts(j, sizes[1])),
    }
    first = [generator.permutation(size)[:n] for size in sizes]
    again = bootstrap.indices(generator, n, n, resamplings)
    for name, inside in zip(("precision", "recall"), precision_recall(a[first[0]], b[first[1]]), strict=True):
        resampled[name] = inside[again].mean(1)
    if sample.hit is not None:
        resampled["label_accuracy"] = sample.hit[i].mean(1)
    intervals = {}
    for name, value in values.items():
        low, high = bootstrap.interval(resampled[name], value)
        intervals[name] = (max(low, METRICS[name].least), min(high, METRICS[name].most))
    return intervals


def render(report: dict[str, Any]) -> str:
    """The report as an aligned table in plain text."""
    rows = [("metric", "samples", "95 % interval", "real floor", "better")]
    for name, row in report["metrics"].items():
        show = _format(row)
        interval = "-" if row["interval"] is None else " .. ".join(show(x) for x in row["interval"])
        rows.append((name, show(row["value"]), interval, show(row["floor"]), row["better"]))
    memory = report["memorisation"]
    rows.append(("frechet / floor", f"{report['frechet_ratio']:.3f}", "-", "1", "lower"))
    rows.append(("distance to training", f"{memory['samples']:.3f}", "-", f"{memory['held_out']:.3f}", "not lower"))
    rows.append(("exact copies", str(memory["exact_copies"]), "-", "-", "lower"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    align = [str.ljust, str.rjust, str.rjust, str.rjust, str.ljust]
    lines = ["  ".join(f(x, w) for f, x, w in zip(align, row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([*lines, *_notes(report)])


def _format(row: dict[str, Any]) -> Callable[[float], str]:
    return (lambda x: f"{x:.4f}") if abs(row["floor"]) < 0.1 else (lambda x: f"{x:.3f}")


def _notes(report: dict[str, Any]) -> list[str]:
    features, accuracy = report["features"], report["features"]["held_out_accuracy"]
    recognised = "" if accuracy is None else f", right on {accuracy:.2%} of the held-out images"
    return [
        f"{report['num_samples']} samples; each figure is of {report['n']} against {report['n']} held-out images, "
        f"mean of {report['subsets']} draws; floor: {report['n']} real training images in their place.",
        f"features: {features['name']} ({features['fingerprint']}){recognised}.",
    ]
