"""`--what=run`: compilation, training and sampling of a config."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from diffusion_jax import tree
from diffusion_jax.cli import arguments
from diffusion_jax.cli import run as runs
from diffusion_jax.cli.bench.instruments import device, durations, peak_flops, timed
from diffusion_jax.cli.workdir import config_of, tokenizer_record
from diffusion_jax.errors import UserError


def measure(values: flags.FlagValues) -> dict[str, Any]:
    """Times of the config that --config or --workdir names."""
    config = config_of(values.workdir) if values.workdir else arguments.config_of(values)
    run = runs.assemble(config).thawed(tokenizer_record(Path(values.workdir)) if values.workdir else None)
    capacity = run.settings.train.log_every
    if values.steps > capacity:
        raise UserError(f"--steps={values.steps}: must be at most train.log_every = {capacity}, one dispatch.")
    trained = train(run, values.steps, values.repetitions, values.profile)
    return device() | trained | sample(run, values.repetitions, values.profile)


def train(run: runs.Run, steps: int, repetitions: int, profile: str | None) -> dict[str, Any]:
    """The training program: compile time, time a step, FLOP/s beside the peak."""
    feed = run.feed()
    program, frozen = run.program(feed), run.for_training()
    chunk, count = feed.chunk(0, steps), tree.place(np.array(steps, np.int32), program.abstract.step.sharding)
    compile_s, advance = timed(lambda: program.advance.lower(program.abstract, chunk, count, frozen).compile())
    state = jax.block_until_ready(program.init())

    def repeat() -> None:
        nonlocal state
        state, _ = jax.block_until_ready(advance(state, chunk, count, frozen))

    seconds = [second / steps for second in durations(repeat, repetitions, profile)]
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


def sample(run: runs.Run, repetitions: int, profile: str | None) -> dict[str, Any]:
    """The sampling program of one batch, under the config's own options."""
    sampler = run.sampler
    init = jax.jit(
        lambda: run.trainer.init().params, out_shardings=jax.tree.map(lambda x: x.sharding, run.weights_like())
    )
    weights = init() | run.frozen.as_weights()
    rows = sampler.labels(sampler.batch_size)

    def draw() -> None:
        sampler.draw(weights, 0, rows, sampler.batch_size, run.options)

    first, _ = timed(draw)
    seconds = durations(draw, repetitions, profile)
    batch_s = float(np.median(seconds))
    return {
        "sample_batch_size": sampler.batch_size,
        "sample_compile_s": first - batch_s,
        "sample_batch_s": batch_s,
        "sample_batch_s_range": [min(seconds), max(seconds)],
        "sample_images_per_s": sampler.batch_size / batch_s,
    }
