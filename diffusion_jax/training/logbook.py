"""What a run tells: metrics.jsonl, TensorBoard events, and a line of progress."""

import datetime
import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

from diffusion_jax.files import write_whole


class Logbook:
    """Writes metrics by step. A context manager.

    A run that goes on from `start` makes the lines after it once more, so those that a killed run left are dropped:
    each step stands once in metrics.jsonl.

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
        self.compiled = False
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

    def progress(self, step: int, metrics: Mapping[str, float]) -> None:
        """A line of training: `metrics` are means over the steps since the last line."""
        now = time.perf_counter()
        rate = (step - self.step) / max(now - self.time, 1e-9)
        self.step, self.time = step, now
        rates = {"steps_per_second": rate, "images_per_second": rate * self.batch_size}
        self.write(step, {**metrics, **rates})
        losses = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items() if name.endswith("loss"))
        speed = f"{losses}  {rate:.1f} steps/s  {rates['images_per_second']:.0f} images/s"
        if self.bar:
            self.bar.update(self.bar.task_ids[0], completed=step, speed=speed)
        else:
            # the first line's steps waited for the compilation, which says nothing of those to come
            left = datetime.timedelta(seconds=round((self.total - step) / rate))
            ending = f"  {left} left" if self.compiled else ""
            print(f"step {step}/{self.total}  {speed}{ending}", file=sys.stderr, flush=True)
        self.compiled = True

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics for the files alone; a value that is not finite is null in JSON."""
        row = {"step": step} | {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")
        for name, value in metrics.items():
            self.events.add_scalar(name, value, step)

    def rest(self) -> None:
        """Leave the time since the last line out of the next line's speed (something else was done)."""
        self.time = time.perf_counter()


def _bar(start: int, total: int) -> Progress:
    columns = (TextColumn("step {task.completed}/{task.total}"), BarColumn(), TextColumn("{task.fields[speed]}"))
    bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))
    bar.add_task("train", total=total, completed=start, speed="compiling")
    return bar


def _drop_after(file: Path, step: int) -> None:
    """Keep the whole lines of steps up to `step`."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue  # the line at which a killed run was writing
    write_whole(file, "".join(kept).encode())
