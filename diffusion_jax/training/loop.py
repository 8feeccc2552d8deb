"""The loop: dispatch, log, save, and leave when told to. No step waits for the host.

One compiled program advances a run by any number of steps up to the feed's capacity: its trip count is an argument.
So a run that was killed and resumed executes the very same program, and ends bit by bit where it would have ended.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from diffusion_jax import rng, tree
from diffusion_jax.data.feed import Feed
from diffusion_jax.errors import RunError
from diffusion_jax.settings import MeshSettings, TrainSettings
from diffusion_jax.training import sharding
from diffusion_jax.training.checkpoint import abstract_like
from diffusion_jax.training.step import Trainer
from diffusion_jax.types import Array, Batch, Metrics, TrainState, Tree

Augment = Callable[[Batch, Array], Batch]

Sums = dict[str, tuple[Array, Array]]
"""Of each metric over some steps: the sum of its finite values, and how many there were."""


class Outcome(NamedTuple):
    """What one dispatch leaves for the log; it stays on the device until a log line asks for it."""

    sums: Sums
    skipped: dict[str, Array]


@dataclass(frozen=True, kw_only=True)
class Program:
    """The compiled run.

    Attributes:
      abstract: shapes and shardings of the state.
      init: () -> state, allocated where it belongs.
      advance: (state, chunk, count i32[], frozen) -> (state, outcome); the state is donated.
    """

    abstract: TrainState
    init: Callable[[], TrainState]
    advance: Callable[[TrainState, Tree, Array, Tree], tuple[TrainState, Outcome]]


@dataclass(frozen=True, kw_only=True)
class Task:
    """Something to do with the state every `every` steps (0: never)."""

    every: int
    act: Callable[[TrainState, int], None]

    def due(self, step: int) -> bool:
        """Whether `step` is one of its steps."""
        return self.every > 0 and step % self.every == 0


def compile_program(
    trainer: Trainer, feed: Feed, mesh: Mesh, settings: MeshSettings, augment: Augment | None = None
) -> Program:
    """Shapes first, shardings from rules, then everything is jitted with those. Nothing is allocated here.

    Args:
      trainer: `init` and `step`.
      feed: where batches come from.
      mesh: the devices.
      settings: rules that come before the default ones.
      augment: (batch, key of the step) -> batch, applied to training images; None to take them as they are.
    """
    shapes = jax.eval_shape(trainer.init)
    shardings = sharding.infer(shapes, mesh, settings)
    everywhere = NamedSharding(mesh, P())

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(shardings, everywhere))
    def advance(state: TrainState, chunk: Tree, count: Array, frozen: Tree) -> tuple[TrainState, Outcome]:
        def step(i: Array, state: TrainState) -> tuple[TrainState, Metrics]:
            batch = feed.batch(chunk, i)
            if augment:
                batch = augment(batch, rng.stream(trainer.seed, "augment", state.step))
            return trainer.step(state, batch, frozen)

        def body(i: Array, carry: tuple[TrainState, Sums]) -> tuple[TrainState, Sums]:
            state, sums = carry
            state, metrics = step(i, state)
            return state, {name: add(sums[name], metrics[name]) for name in metrics}

        names = jax.eval_shape(step, jnp.int32(0), state)[1]
        zeros = {name: (jnp.float32(0), jnp.float32(0)) for name in names}
        state, sums = jax.lax.fori_loop(0, count, body, (state, zeros))
        return state, Outcome(sums=sums, skipped=state.skipped)

    init = jax.jit(trainer.init, out_shardings=shardings)
    return Program(abstract=abstract_like(shapes, shardings), init=init, advance=advance)


def add(total: tuple[Array, Array], value: Array) -> tuple[Array, Array]:
    """Add a value to (sum, count) unless it is not finite."""
    finite = jnp.isfinite(value)
    return total[0] + jnp.where(finite, value, 0.0), total[1] + finite.astype(jnp.float32)


def run(
    program: Program,
    feed: Feed,
    state: TrainState,
    start: int,
    train: TrainSettings,
    *,
    frozen: Tree,
    tasks: Sequence[Task],
    log: Callable[[int, dict[str, float]], None],
    stop: Callable[[], bool],
) -> tuple[TrainState, int]:
    """Train from step `start` to `train.steps`, or until `stop()`.

    Args:
      program: from `compile_program`.
      feed: where batches come from.
      state: the state at step `start`; donated.
      start: finished steps.
      train: how many steps, and how often to log.
      frozen: parameters of other models.
      tasks: what else is to be done on the way; the log is up to date when they run.
      log: (step, means of the metrics since the last line).
      stop: asked between dispatches.

    Returns:
      The state and the number of finished steps.

    Raises:
      RunError: after `train.max_skipped` updates in a row that were not finite.
    """
    everywhere = program.abstract.step.sharding
    step, window, waiting = start, [], None
    with jax.transfer_guard("disallow"):
        while step < train.steps and not stop():
            marks = [train.log_every, *(task.every for task in tasks if task.every)]
            count = min(feed.capacity, train.steps - step, *(mark - step % mark for mark in marks))
            chunk = feed.chunk(step, count)
            state, outcome = program.advance(state, chunk, tree.place(np.array(count, np.int32), everywhere), frozen)
            step, window = step + count, [*window, outcome]

            due = [task for task in tasks if task.due(step)]
            if step % train.log_every == 0 or step == train.steps or due:
                # The line before this one is written only now: the device already works on what comes after it.
                waiting = _flush(waiting, train, log)
                waiting, window = (step, window), []
            if due:
                waiting = _flush(waiting, train, log)
                with jax.transfer_guard("allow"):
                    for task in due:
                        task.act(state, step)
        _flush(waiting, train, log)
        _flush((step, window), train, log)
    return state, step


def _flush(waiting: tuple[int, list[Outcome]] | None, train: TrainSettings, log: Callable) -> None:
    """Fetch the outcomes of a window of steps and log their means."""
    if not waiting or not waiting[1]:
        return
    step, outcomes = waiting[0], jax.device_get(waiting[1])
    means = {}
    for name in outcomes[0].sums:
        total, count = np.sum([outcome.sums[name] for outcome in outcomes], axis=0)
        means[name] = float(total / count) if count else float("nan")
    skipped = {name: int(value) for name, value in outcomes[-1].skipped.items()}
    log(step, means | {"skipped": skipped["total"]})
    if skipped["in_a_row"] >= train.max_skipped:
        raise RunError(
            f"Stopped at step {step}: loss or gradients were not finite in {skipped['in_a_row']} steps in a row "
            f"(train.max_skipped = {train.max_skipped}). The last checkpoint is untouched; a lower "
            "train.learning_rate or train.clip_norm may help."
        )
