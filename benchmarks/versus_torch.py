"""Our networks against the same networks with the same weights in PyTorch, on this machine, in one run.

    python -m benchmarks.versus_torch --out=race.json

Each side is a process of its own, and they take turns: ours, eager PyTorch, compiled PyTorch, ours, ... The table gives
medians and ranges over the turns; the speed-up is over PyTorch's best form. In float32 both sides' outputs are compared
first. Without torch (--torch_python names another interpreter that has it) our side runs alone.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.racers import Task
from diffusion_jax.cli import xla

ROOT = Path(__file__).parents[1]
FORMS = {
    "dit": ("eager", "diffusers", "compiled"),
    "unet": ("eager", "eager channels_last", "compiled channels_last"),
}
"""PyTorch's, for transformers and for networks of convolutions; the other compiled form is no faster."""
KINDS = {"dit": ("dit-",), "unet": ("ddpm-", "iddpm-", "adm-")}
"""How the names of the presets begin that have a twin in PyTorch."""


def main() -> None:
    """Run every case and print a table; the JSON is written after each."""
    args = arguments()
    result = {"machine": machine(args), "commit": commit(), "cases": [], "versions": {}}
    for network in args.networks.split(","):
        kind(network)  # ends here where there is no twin
    for network in args.networks.split(","):
        for dtype in args.dtypes.split(","):
            with tempfile.TemporaryDirectory() as folder:
                task = Task(
                    network=network,
                    what="denoise",
                    dtype=dtype,
                    batch=args.batch,
                    form="ours",
                    device=args.device,
                    threads=args.threads,
                    folder=folder,
                )
                for what in ("denoise", "train"):
                    case, seen = run(replace(task, what=what), args)
                    result["versions"] |= seen
                    result["cases"].append(case)
                    print(row(case), file=sys.stderr, flush=True)
                    if args.out:
                        args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(table(result))


def arguments() -> argparse.Namespace:
    """The command's flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default="dit-s/2,ddpm-cifar10", help="presets")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of both sides, on a CPU")
    parser.add_argument("--turns", type=int, default=5, help="of each side in each case")
    parser.add_argument("--seconds", type=float, default=1.0, help="that a turn lasts, or one step where that is more")
    parser.add_argument("--torch_python", default=sys.executable, help="an interpreter with torch and diffusers")
    parser.add_argument("--out", type=Path, help="a JSON file for all figures")
    return parser.parse_args()


# ---------------------------------------------------------------------------------------------- one case


def run(task: Task, args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, str]]:
    """(figures of one network, dtype and measurement; versions of the sides)."""
    racers = {"ours": Racer("ours", sys.executable, task)}
    if can_race(args.torch_python):
        for form in FORMS[kind(task.network)]:
            try:
                racers[form] = Racer("pytorch", args.torch_python, replace(task, form=form))
            except EndedError as error:  # as torch.compile does where there is no C++ compiler
                print(f"{form} does not race: {error}", file=sys.stderr)
    steps = {form: max(1, round(args.seconds / racer.turn(1))) for form, racer in racers.items()}
    seconds: dict[str, list[float]] = {form: [] for form in racers}
    for _ in range(args.turns):
        for form, racer in racers.items():
            seconds[form].append(racer.turn(steps[form]) / steps[form])
    for racer in racers.values():
        racer.end()

    case = {name: getattr(task, name) for name in ("network", "dtype", "what", "batch")}
    case["step_s"] = {form: {"median": median(s), "range": [min(s), max(s)]} for form, s in seconds.items()}
    case["ready_s"] = {form: racer.about.pop("ready_s") for form, racer in racers.items()}
    theirs = {form: median(s) for form, s in seconds.items() if form != "ours"}
    if theirs:
        case["best"] = min(theirs, key=theirs.get)
        case["speed_up"] = theirs[case["best"]] / median(seconds["ours"])
        if task.what == "denoise" and task.dtype == "float32":
            case["difference"] = difference(Path(task.folder))
    return case, {name: value for racer in racers.values() for name, value in racer.about.items()}


def kind(network: str) -> str:
    """The twin in PyTorch that a preset has."""
    for name in FORMS:
        if network.startswith(KINDS[name]):
            return name
    raise SystemExit(f"--networks={network}: only presets that begin with {sum(KINDS.values(), ())} have a twin.")


class EndedError(Exception):
    """A racer's process has ended before its time."""


class Racer:
    """A process of `benchmarks.racers`, ready when this returns."""

    def __init__(self, side: str, python: str, task: Task) -> None:
        command = [python, "-m", f"benchmarks.racers.{side}", json.dumps(asdict(task))]
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": str(task.threads),
            "JAX_PLATFORMS": task.device if side == "ours" else "cpu",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # memory in large pages, for both sides
        }
        xla.set_cpu_flags(environment)
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, text=True)
        self.about = self.answer()

    def turn(self, steps: int) -> float:
        """Seconds of so many steps."""
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> Any:
        """The next line."""
        line = self.process.stdout.readline()
        if not line:
            raise EndedError(f"{self.process.args[2]} ended with status {self.process.wait()}; see above.")
        return json.loads(line)

    def end(self) -> None:
        """Let the process end."""
        self.process.communicate()


def can_race(python: str) -> bool:
    """Whether an interpreter has torch and diffusers."""
    found = subprocess.run([python, "-c", "import torch, diffusers"], capture_output=True, cwd=ROOT)
    if found.returncode:
        print(f"{python} has no torch or no diffusers: our side runs alone", file=sys.stderr)
    return not found.returncode


def difference(folder: Path) -> float:
    """Largest difference between both sides' outputs over their largest entry."""
    ours, theirs = np.load(folder / "ours.npy"), np.load(folder / "theirs.npy")
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


# ---------------------------------------------------------------------------------------------- the report


def machine(args: argparse.Namespace) -> str:
    """Processor and threads, or the graphics card's name."""
    if args.device == "cuda":
        ask = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return subprocess.run(ask, capture_output=True, text=True).stdout.split("\n")[0]
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {args.threads} threads"


def commit() -> str:
    """Of this checkout, with a mark where files differ from it."""
    ask = ["git", "describe", "--always", "--dirty", "--abbrev=7"]
    return subprocess.run(ask, capture_output=True, text=True, cwd=ROOT).stdout.strip() or "unknown"


def table(result: dict[str, Any]) -> str:
    """All cases as a Markdown table."""
    versions = ", ".join(f"{name} {value}" for name, value in sorted(result["versions"].items()))
    head = (
        "| network | dtype | step | ours, ms | PyTorch, ms | its best form | speed-up |\n|---|---|---|---|---|---|---|"
    )
    return "\n".join(
        [f"{result['machine']}; {versions}; commit {result['commit']}", "", head, *map(row, result["cases"])]
    )


def row(case: dict[str, Any]) -> str:
    """One case as a row."""

    def text(form: str) -> str:
        times = case["step_s"][form]
        low, high = times["range"]
        return f"{1e3 * times['median']:.0f} ({1e3 * low:.0f} to {1e3 * high:.0f})"

    cells = [case["network"], case["dtype"], case["what"], text("ours")]
    cells += [text(case["best"]), case["best"], f"{case['speed_up']:.2f}"] if "best" in case else ["", "", ""]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
