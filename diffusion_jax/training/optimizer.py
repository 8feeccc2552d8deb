"""Optimizers and learning-rate schedules, by their names in optax."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import optax

from diffusion_jax import plugs
from diffusion_jax.settings import TrainSettings

OPTIMIZERS = ("adam", "adamw", "adafactor", "lamb", "lion", "nadam", "nadamw", "radam", "rmsprop", "sgd")


def build(train: TrainSettings) -> optax.GradientTransformation:
    """Clip by global norm where asked, then the optimizer with its learning-rate schedule.

    Raises:
      UserError: for a name that optax does not have, or an option that its function does not take.
    """
    table = {name: getattr(optax, name) for name in OPTIMIZERS}
    rate = learning_rate(train)
    optimizer = plugs.build("train.optimizer", train.optimizer, table, learning_rate=rate)
    clip = optax.clip_by_global_norm(train.clip_norm) if train.clip_norm else optax.identity()
    return _with_optax_promotion(optax.chain(clip, optimizer))


def _with_optax_promotion(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Let optax mix integer counts with float rates, also where the rest of a program is strict about dtypes."""

    def update(*args: Any) -> tuple[Any, Any]:
        with jax.numpy_dtype_promotion("standard"):
            return inner.update(*args)

    return optax.GradientTransformation(inner.init, update)


def learning_rate(train: TrainSettings) -> Callable:
    """step -> learning rate, from any `optax.*_schedule`.

    `train.learning_rate` is the peak (or the only, or the initial) value and `train.steps` the length, unless the
    schedule's own options say otherwise.
    """
    table = {
        name: getattr(optax, name)
        for name in dir(optax)
        if name.endswith("_schedule") and not name.startswith(("inject", "join", "piecewise"))
    }
    name, options = plugs.parse("train.learning_rate_schedule", train.learning_rate_schedule)
    takes = inspect.signature(table[name]).parameters if name in table else {}
    if "peak_value" in takes:
        given = {"init_value": 0.0, "peak_value": train.learning_rate}
    else:
        given = {"value": train.learning_rate, "init_value": train.learning_rate}
    given |= {"decay_steps": train.steps, "transition_steps": train.steps}
    given = {key: value for key, value in given.items() if key in takes and key not in options}
    return plugs.build("train.learning_rate_schedule", train.learning_rate_schedule, table, **given)
