"""Measure the order of convergence of every ODE solver, and plot it.

    python experiments/solver_orders.py --out=docs/solver_orders.png

Each solver walks from sigma / alpha = 60 to 1, to 0.2 and to 0.02 (on one stretch alone an error may happen to pass
through 0) on Gaussian data, whose ideal denoiser and exact flow are known, in float64, in equal steps of log-SNR and in
steps of 1 and 3 in turn. The order is the slope of log(mean error) over log(steps), fitted to the finer half.

Mirrors Figure 3 of Lu et al. 2022 (DPM-Solver) and Table 1 of Zhao et al. 2023 (UniPC), with the truth in place of a
fine solution. Cost: half a minute on two CPU cores.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from diffusion_jax import plugs
from diffusion_jax.diffusion.grids import MAX_STEPS
from diffusion_jax.diffusion.ideal import gaussian_flow, mixture
from diffusion_jax.diffusion.schedule import SCHEDULES, Schedule
from diffusion_jax.diffusion.solvers import SOLVERS
from diffusion_jax.diffusion.solvers.base import solve

OUT = flags.DEFINE_string("out", "docs/solver_orders.png", "the picture to write")

ODE = (
    "euler",
    "ddim",
    "heun",
    "dpmpp_2s",
    "dpmpp_2m",
    "lms(order=2)",
    "lms(order=4)",
    "pndm",
    "dpm_solver_3",
    "dpmpp_3m",
    "exponential_3m",
    "unipc(order=2)",
    "unipc(order=3)",
)
NAMES = ("vp_linear", "edm", "rectified_flow")
STEPS = np.array([8, 16, 32, 64, 128, 256, 512])
MEAN, STD, HIGH, LOWS = 0.4, 0.5, 60.0, (1.0, 0.2, 0.02)


def times(schedule: Schedule, steps: int, low: float, zigzag: bool) -> jnp.ndarray:
    """f64[MAX_STEPS + 1]: equal steps of log-SNR from HIGH to `low`, or steps of 1 and 3 in turn."""
    width = np.where(np.arange(steps) % 2, 3.0, 1.0) if zigzag else np.ones(steps)
    u = np.concatenate([[0.0], np.cumsum(width)]) / width.sum()
    stops = schedule.time(jnp.asarray(-2.0 * (np.log(HIGH) + u * np.log(low / HIGH))))
    return jnp.zeros(MAX_STEPS + 1).at[: steps + 1].set(stops)


def errors(text: str, name: str, zigzag: bool) -> np.ndarray:
    """Mean absolute error over the three ends, for each of STEPS."""
    schedule, solver = SCHEDULES[name](), plugs.build("solver", text, SOLVERS)
    denoise = mixture(schedule, jnp.full((1, 1, 1, 1), MEAN), jnp.array([STD]), jnp.ones(1))
    keys = jax.random.split(jax.random.key(0), 4)
    start = times(schedule, 1, LOWS[0], False)[0]
    alpha, sigma = schedule.alpha(start), schedule.sigma(start)
    x = alpha * MEAN + jnp.hypot(sigma, alpha * STD) * jnp.array([-1.3, -0.4, 0.5, 1.6]).reshape(4, 1, 1, 1)
    walk = jax.jit(lambda grid, steps: solve(denoise, schedule, solver, grid, steps, x, keys))

    def error(steps: int, low: float) -> jnp.ndarray:
        grid = times(schedule, steps, low, zigzag)
        return jnp.abs(walk(grid, jnp.int32(steps)) - gaussian_flow(schedule, x, start, grid[steps], MEAN, STD)).mean()

    return np.array([np.mean([error(steps, low) for low in LOWS]) for steps in STEPS.tolist()])


def order(found: np.ndarray) -> float:
    """The fitted slope over the finer half of STEPS, while the error is above the rounding of float64."""
    half = [i for i in range(len(STEPS) // 2, len(STEPS)) if found[i] > 1e-13]
    return float("nan") if len(half) < 2 else -np.polyfit(np.log(STEPS[half]), np.log(found[half]), 1)[0]


def main(argv: list[str]) -> None:
    """Measure, print the table, draw."""
    if argv[1:]:
        sys.exit(f"{argv[1]!r} is no flag; write --out=FILE.png.")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    print("| solver | " + " | ".join(f"{name} | zig-zag" for name in NAMES) + " |")
    print("|---|" + "---|" * (2 * len(NAMES)))
    figure, axes = pyplot.subplots(1, len(NAMES), figsize=(13, 4.5), sharey=True, layout="constrained")
    with jax.enable_x64(True):
        for index, text in enumerate(ODE):
            row = [errors(text, name, zigzag) for name in NAMES for zigzag in (False, True)]
            print(f"| `{text}` | " + " | ".join(f"{order(found):.2f}" for found in row) + " |", flush=True)
            for axis, found in zip(axes, row[::2], strict=True):
                style = "-" if index < 10 else "--"
                axis.loglog(STEPS, np.maximum(found, 1e-16), style, marker="o", markersize=3, label=text)
    for axis, name in zip(axes, NAMES, strict=True):
        axis.set(title=name, xlabel="steps")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("mean absolute error")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(OUT.value, dpi=110)


if __name__ == "__main__":
    app.run(main)
