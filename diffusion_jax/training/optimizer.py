"""Optimizers and learning-rate schedules, by their names in optax."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import optax

from diffusion_jax import plugs
from diffusion_jax.errors import require
from diffusion_jax.settings import TrainSettings

SCHEDULES = (
    "constant_schedule",
    "cosine_decay_schedule",
    "cosine_onecycle_schedule",
    "exponential_decay",
    "linear_onecycle_schedule",
    "linear_schedule",
    "polynomial_schedule",
    "warmup_constant_schedule",
    "warmup_cosine_decay_schedule",
    "warmup_exponential_decay_schedule",
)
OPTIMIZERS = ("adam", "adamw", "adafactor", "lamb", "lion", "nadam", "nadamw", "radam", "rmsprop", "sgd")


def build(train: TrainSettings, every: int = 1, start: int = 0) -> optax.GradientTransformation:
    """Clip by global norm where asked, then the optimizer with its learning-rate schedule.

    Args:
      train: the config's `train` section.
      every: steps from one update to the next; the schedule is one of steps.
      start: step of the first update, or before it.

    Raises:
      UserError: for a name that optax does not have, or an option that its function does not take.
    """
    table = {name: getattr(optax, name) for name in OPTIMIZERS}
    rate = learning_rate(train)
    first = -(-start // every) * every
    of_update = rate if (every, first) == (1, 0) else lambda count: rate(first + every * count)
    optimizer = plugs.build("train.optimizer", train.optimizer, table, learning_rate=of_update)
    clip = optax.clip_by_global_norm(train.clip_norm) if train.clip_norm else optax.identity()
    return _with_optax_promotion(optax.chain(clip, optimizer))


def _with_optax_promotion(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Let optax mix integer counts with float rates, also where the rest of a program is strict about dtypes."""

    def update(*args: Any) -> tuple[Any, Any]:
        with jax.numpy_dtype_promotion("standard"):
            return inner.update(*args)

    return optax.GradientTransformation(inner.init, update)


def learning_rate(train: TrainSettings) -> Callable:
    """step -> learning rate, by the name of one of optax's `SCHEDULES`.

    `train.learning_rate` is the peak (or the only, or the initial) value and `train.steps` the length, unless the
    schedule's own options say otherwise.
    """
    table = {name: getattr(optax, name) for name in SCHEDULES}
    name, options = plugs.parse("train.learning_rate_schedule", train.learning_rate_schedule)
    takes = inspect.signature(table[name]).parameters if name in table else {}
    peak = next((key for key in ("peak_value", "value", "init_value") if key in takes), "")
    rule = f"leave {peak} out: it is train.learning_rate"
    require(peak not in options, "train.learning_rate_schedule", train.learning_rate_schedule, rule)
    given = {"init_value": 0.0, "decay_steps": train.steps, "transition_steps": train.steps, peak: train.learning_rate}
    given = {key: value for key, value in given.items() if key in takes and key not in options}
    return plugs.build("train.learning_rate_schedule", train.learning_rate_schedule, table, **given)
