"""Figures of several runs, as PNG: grids of their samples by pillow, curves by matplotlib."""

import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw

from diffusion_jax.cli import pictures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARGIN = 24
"""Pixels around a grid; the run's name stands in those above it."""


def side_by_side(images: Mapping[str, np.ndarray]) -> bytes:
    """A grid of each run's u8[N,H,W,C], all of one shape, under the run's name; image i has the same place in each."""
    grids = {name: Image.open(io.BytesIO(pictures.png(shown, least=320))) for name, shown in images.items()}
    width, height = next(iter(grids.values())).size
    figure = Image.new("RGB", (MARGIN + len(grids) * (width + MARGIN), height + 2 * MARGIN), "white")
    for i, (name, grid) in enumerate(grids.items()):
        left = MARGIN + i * (width + MARGIN)
        ImageDraw.Draw(figure).text((left, MARGIN // 4), name, fill="black", font_size=14)
        figure.paste(grid, (left, MARGIN))
    buffer = io.BytesIO()
    figure.save(buffer, "PNG")
    return buffer.getvalue()


def quality(records: Sequence[Mapping[str, Any]], sweep: Sequence[Mapping[str, Any]]) -> bytes:
    """The Fréchet distance against FLOPs a sample, with intervals, and the real floor.

    Args:
      records: one a run, as in `evaluation.comparison`; a large mark each.
      sweep: some of their figures at other numbers of steps, joined by a line.
    """
    figure = _figure(width=8.4)
    axes = figure.add_subplot(xlabel="FLOPs a sample", ylabel="Fréchet distance", xscale="log")
    costs = [row["sampling_flops"] for row in (*records, *sweep)]
    axes.set_xlim(min(costs) / 2.0, max(costs) * 2.0)  # runs of one cost leave a logarithmic axis of no width
    for i, record in enumerate(records):
        walk = sorted((row for row in sweep if row["run"] == record["run"]), key=lambda row: row["sampling_flops"])
        if walk:
            _points(axes, walk, color=f"C{i}", marker=".", linestyle="-")
        _points(axes, [record], color=f"C{i}", marker="o", label=record["run"])
    axes.axhline(records[0]["frechet_floor"], color="grey", linestyle="--", label="real images")
    axes.set_ylim(bottom=0.0)
    figure.legend(loc="outside right upper")
    return _png(figure)


def _points(axes: Any, rows: Sequence[Mapping[str, Any]], **style: Any) -> None:
    x, y, low, high = (
        np.array([row[name] for row in rows]) for name in ("sampling_flops", "frechet", "frechet_low", "frechet_high")
    )
    axes.errorbar(x, y, yerr=np.maximum([y - low, high - y], 0.0), capsize=3, **({"linestyle": ""} | style))


def losses(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> bytes:
    """Each run's losses against the step, of the lines of its metrics.jsonl; an axis each, for they differ in kind."""
    figure = _figure(width=4.0 * len(curves))
    for axes, (name, rows) in zip(np.atleast_1d(figure.subplots(1, len(curves))), curves.items(), strict=True):
        named = defaultdict(list)
        for row in rows:
            for key, value in row.items():
                if key.split("/")[-1] == "loss" and value is not None:
                    named[key].append((row["step"], value))
        for key, points in named.items():
            axes.plot(*zip(*points, strict=True), label=key)
        axes.set(title=name, xlabel="step")
        axes.legend()
    return _png(figure)


def _figure(width: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, 4.0), dpi=120, layout="constrained")


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
