"""One process a side of a race: it gets ready, then runs as many steps as it is asked for and says how long they took.

A racer is started as `python -m benchmarks.racers.NAME '{...}'` with a `Task` as JSON, from the checkout's root. It
answers with one JSON object a line on its standard output: first what `prepare` says of itself, then the seconds of
each number of steps that it reads from its standard input.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is to be run.

    Attributes:
      network: a preset of ours.
      what: "denoise", one forward pass; "train", loss, gradient and AdamW.
      dtype: "float32" or "bfloat16", the arithmetic's; parameters that are trained are float32.
      batch: images at once.
      form: which of a side's forms, such as "compiled".
      device: "cpu" or "cuda".
      threads: on a CPU.
      folder: for what the sides share: weights and inputs, and what each makes of them.
    """

    network: str
    what: str
    dtype: str
    batch: int
    form: str
    device: str
    threads: int
    folder: str


SETTLING = 2
"""Untimed steps before each turn: memory that another process gave back costs seconds to have again, once."""

Prepare = Callable[[Task], tuple[Callable[[], None], dict[str, Any]]]
"""-> (one step, waited for; what the racer has to say)."""


def race(prepare: Prepare) -> None:
    """Serve until the standard input ends. What libraries print goes to the standard error."""
    answers, sys.stdout = sys.stdout, sys.stderr
    task = Task(**json.loads(sys.argv[1]))
    if task.device == "cpu" and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: task.threads])
    start = time.perf_counter()
    step, about = prepare(task)
    step()
    print(json.dumps(about | {"ready_s": time.perf_counter() - start}), file=answers, flush=True)
    for line in sys.stdin:
        for _ in range(SETTLING):
            step()
        start = time.perf_counter()
        for _ in range(int(line)):
            step()
        print(json.dumps(time.perf_counter() - start), file=answers, flush=True)
