"""Averages of the weights: rules for the decay of step n (1 at the first update)."""

from typing import Protocol

import jax.numpy as jnp

from diffusion_jax.types import Array


class Rule(Protocol):
    """(step f32[], 1 at the first update) -> f32[] in [0, 1]: ema <- decay ema + (1 - decay) params."""

    def __call__(self, step: Array) -> Array: ...  # noqa: D102


def constant(decay: float = 0.9999) -> Rule:
    """The same decay at every step."""
    _check(decay)
    return lambda step: jnp.float32(decay)


def warmup(decay: float = 0.9999) -> Rule:
    """min(decay, (1 + n) / (10 + n)): the start, far from the end, is forgotten (TensorFlow's moving averages)."""
    _check(decay)
    return lambda step: jnp.minimum(jnp.float32(decay), (1.0 + step) / (10.0 + step))


def _check(decay: float) -> None:
    if not 0.0 <= decay < 1.0:
        raise ValueError(f"decay must lie in [0, 1), not {decay}")


RULES = {"constant": constant, "warmup": warmup}
