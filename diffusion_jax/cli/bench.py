"""Time compilation, training and sampling of a config on the devices that are here. Nothing is written.

Times are medians over repetitions, after compilation and one warm-up; the share of the peak compares the training step
with a large plain matrix product in the same process and precision.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from diffusion_jax.cli import arguments
from diffusion_jax.errors import UserError


def define(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """The command's flags."""
    arguments.define_config(values, argv)
    flags.DEFINE_string("workdir", None, "time the config of this run instead of --config", flag_values=values)
    flags.DEFINE_integer("steps", 20, "training steps a repetition", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("repetitions", 5, "of each measurement", lower_bound=2, flag_values=values)
    flags.DEFINE_boolean("json", False, "print the result as one JSON object in the last line", flag_values=values)


def main(argv: Sequence[str]) -> None:
    """Run the command. The compilation cache stays off, so that compile times are those of a first run."""
    values = arguments.parse("bench", define, argv)
    if values.workdir and values.config:
        raise UserError("--workdir has a config of its own; leave out --config.")

    from diffusion_jax.cli import run as runs
    from diffusion_jax.cli.workdir import saved_config

    config = saved_config(Path(values.workdir)) if values.workdir else arguments.config_of(values)
    if config is None:
        raise UserError(f"--workdir={values.workdir}: there is no run here (no config.json).")
    run = runs.assemble(config)
    capacity = run.settings.train.log_every
    if values.steps > capacity:
        raise UserError(f"--steps={values.steps}: must be at most train.log_every = {capacity}, one dispatch.")
    result = device() | train(run, values.steps, values.repetitions) | sample(run, values.repetitions)
    print(render(result), file=sys.stderr if values.json else sys.stdout)
    if values.json:
        print(json.dumps(result))


def device() -> dict[str, Any]:
    """What the numbers were measured on."""
    import jax

    return {"device": jax.devices()[0].device_kind, "devices": jax.device_count(), "jax": jax.__version__}


def train(run: Any, steps: int, repetitions: int) -> dict[str, Any]:
    """The training program: compile time, time a step, FLOP/s beside the peak."""
    import jax

    from diffusion_jax import tree

    feed = run.feed()
    program = run.program(feed)
    chunk, count = feed.chunk(0, steps), tree.place(np.array(steps, np.int32), program.abstract.step.sharding)
    compile_s, advance = timed(lambda: program.advance.lower(program.abstract, chunk, count, {}).compile())
    state = jax.block_until_ready(program.init())

    def repeat() -> None:
        nonlocal state
        state, _ = jax.block_until_ready(advance(state, chunk, count, {}))

    seconds = [second / steps for second in durations(repeat, repetitions)]
    # The loop's body is counted once, whatever the number of steps, and for one device.
    flops = float((advance.cost_analysis() or {}).get("flops", 0.0)) * jax.device_count()
    step_s, peak = float(np.median(seconds)), peak_flops(run.settings.precision)
    return {
        "parameters": tree.count(program.abstract.params),
        "batch_size": run.settings.train.batch_size,
        "train_compile_s": compile_s,
        "train_step_s": step_s,
        "train_step_s_range": [min(seconds), max(seconds)],
        "train_images_per_s": run.settings.train.batch_size / step_s,
        "train_flops_per_s": flops / step_s,
        "peak_flops_per_s": peak,
        "train_share_of_peak": flops / step_s / peak,
    }


def sample(run: Any, repetitions: int) -> dict[str, Any]:
    """The sampling program of one batch, under the config's own options."""
    import jax

    sampler = run.sampler
    init = jax.jit(
        lambda: run.trainer.init().params, out_shardings=jax.tree.map(lambda x: x.sharding, run.weights_like())
    )
    weights = init()
    rows = sampler.labels(sampler.batch_size)

    def draw() -> None:
        sampler.draw(weights, 0, rows, sampler.batch_size, run.options)

    first, _ = timed(draw)
    seconds = durations(draw, repetitions)
    batch_s = float(np.median(seconds))
    return {
        "sample_batch_size": sampler.batch_size,
        "sample_compile_s": first - batch_s,
        "sample_batch_s": batch_s,
        "sample_batch_s_range": [min(seconds), max(seconds)],
        "sample_images_per_s": sampler.batch_size / batch_s,
    }


def peak_flops(precision: str, repetitions: int = 5) -> float:
    """FLOP/s of a large square matrix product on every device at once."""
    import jax
    import jax.numpy as jnp

    size = 2048 if jax.default_backend() == "cpu" else 8192
    x = jnp.ones((size, size), precision)
    products = [jax.device_put(x, device) for device in jax.devices()]
    multiply = jax.jit(lambda x: x @ x)

    def repeat() -> None:
        jax.block_until_ready([multiply(x) for x in products])

    repeat()
    return len(products) * 2.0 * size**3 / float(np.median(durations(repeat, repetitions)))


def timed(act: Callable[[], Any]) -> tuple[float, Any]:
    """(seconds, what `act` returned)."""
    start = time.perf_counter()
    result = act()
    return time.perf_counter() - start, result


def durations(act: Callable[[], Any], repetitions: int) -> list[float]:
    """Seconds of each of `repetitions` calls, after one that is not counted."""
    act()
    return [timed(act)[0] for _ in range(repetitions)]


def render(result: dict[str, Any]) -> str:
    """The result as a table."""

    def text(value: Any) -> str:
        if isinstance(value, list):
            return " .. ".join(text(item) for item in value)
        return f"{value:,.4g}" if isinstance(value, float) else str(value)

    return "\n".join(f"{name:24s}{text(value)}" for name, value in result.items())
