"""What a run tells: metrics.jsonl, TensorBoard events, and a line of progress."""

import datetime
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

from diffusion_jax.files import write_whole

NO_WARNINGS: Mapping[str, str] = MappingProxyType({})


class Logbook:
    """Writes metrics by step. A context manager.

    A run that goes on from `start` makes the lines after it once more, so those that a killed run left are dropped:
    each step stands once in metrics.jsonl.

    `seconds` in a line of training are those of all steps so far, without what was done beside them: compilation,
    checkpoints, grids, evaluations. They go on where an interrupted run's last line left them.

    Args:
      workdir: the run's directory.
      start: finished steps.
      total: steps of the whole run.
      batch_size: examples a step.
    """

    def __init__(self, workdir: Path, start: int, total: int, batch_size: int) -> None:
        self.total, self.batch_size = total, batch_size
        self.file = workdir / "metrics.jsonl"
        _drop_after(self.file, start)
        self.events = SummaryWriter(str(workdir), purge_step=start + 1 if start else None)
        self.step, self.time = start, time.perf_counter()
        self.seconds = seconds_until(self.file, start)
        self.warned: set[str] = set()
        self.bar = _bar(start, total) if sys.stdout.isatty() and sys.stderr.isatty() else None

    def __enter__(self) -> "Logbook":
        """Show the progress bar, on a terminal."""
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close everything."""
        if self.bar:
            self.bar.stop()
        self.events.close()

    def progress(self, step: int, metrics: Mapping[str, float], warnings: Mapping[str, str] = NO_WARNINGS) -> None:
        """A line of training: `metrics` are means over the steps since the last line, `warnings` sentences by name.

        A warning is printed when it begins, and again where it had gone in between; each line of the file has its name.
        """
        now = time.perf_counter()
        rate = (step - self.step) / max(now - self.time, 1e-9)
        self.seconds += now - self.time
        self.step, self.time = step, now
        rates = {"steps_per_second": rate, "images_per_second": rate * self.batch_size}
        self.write(step, {**metrics, **rates, "seconds": self.seconds}, sorted(warnings))
        losses = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items() if name.endswith("loss"))
        speed = f"{losses}  {rate:.1f} steps/s  {rates['images_per_second']:.0f} images/s"
        if self.bar:
            self.bar.update(self.bar.task_ids[0], completed=step, speed=speed)
        else:
            left = datetime.timedelta(seconds=round((self.total - step) / rate))
            print(f"step {step}/{self.total}  {speed}  {left} left", file=sys.stderr, flush=True)
        for name in sorted(set(warnings) - self.warned):
            print(f"step {step}  warning, {name}: {warnings[name]}", file=sys.stderr, flush=True)
        self.warned = set(warnings)

    def write(self, step: int, metrics: Mapping[str, float], warnings: Sequence[str] = ()) -> None:
        """Metrics, and the names of warnings, for the files alone; a value that is not finite is null in JSON."""
        row = {"step": step} | {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        if warnings:
            row["warnings"] = list(warnings)
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")
        for name, value in metrics.items():
            self.events.add_scalar(name, value, step)

    def rest(self) -> None:
        """Leave the time since the last line out of the next line's times (something else was done)."""
        self.time = time.perf_counter()


def _bar(start: int, total: int) -> Progress:
    columns = (TextColumn("step {task.completed}/{task.total}"), BarColumn(), TextColumn("{task.fields[speed]}"))
    bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))
    bar.add_task("train", total=total, completed=start, speed="compiling")
    return bar


def lines(file: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a metrics.jsonl; none where it is not there."""
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            row = json.loads(line)
            if isinstance(row["step"], int):
                yield row
        except (ValueError, KeyError, TypeError):
            continue  # the line at which a killed run was writing


def seconds_until(file: Path, step: int) -> float:
    """How long a run has trained for its first `step` steps, by its metrics.jsonl; NaN where that does not say."""
    known = [row["seconds"] for row in lines(file) if row["step"] <= step and row.get("seconds") is not None]
    return known[-1] if known else 0.0 if step == 0 else math.nan


def _drop_after(file: Path, step: int) -> None:
    """Keep the whole lines of steps up to `step`."""
    if file.exists():
        kept = [json.dumps(row) + "\n" for row in lines(file) if row["step"] <= step]
        write_whole(file, "".join(kept).encode())
