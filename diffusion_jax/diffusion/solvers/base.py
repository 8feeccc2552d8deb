"""What a solver is, and the loop that runs it."""

from dataclasses import fields
from typing import Protocol, TypeVar

import jax

from diffusion_jax import rng
from diffusion_jax.diffusion.schedule import Schedule
from diffusion_jax.types import Array, Denoiser, Tree

T = TypeVar("T")


def pytree(cls: type[T]) -> type[T]:
    """Register a frozen dataclass as a pytree whose leaves are its fields.

    `jax.tree_util.register_dataclass` (jax 0.10 to 0.12) takes two classes with equal fields for one structure, and a
    jitted function may then run the wrong solver's program; here the class's name is part of the structure.
    """
    names = [field.name for field in fields(cls)]

    def flatten(solver: T) -> tuple[tuple, str]:
        return tuple(getattr(solver, name) for name in names), cls.__qualname__

    def unflatten(_: str, leaves: tuple) -> T:
        solver = object.__new__(cls)  # leaves may be anything while jax moves them about: no check of ranges here
        for name, leaf in zip(names, leaves, strict=True):
            object.__setattr__(solver, name, leaf)
        return solver

    jax.tree_util.register_pytree_node(cls, flatten, unflatten)
    return cls


class Solver(Protocol):
    """A solver is a pytree: its numeric options are leaves, so changing them does not compile again."""

    def init(self, x: Array) -> Tree:
        """The carry before the first step: fixed buffers where the solver has a memory, () where not."""
        ...

    def step(
        self, denoise: Denoiser, schedule: Schedule, x: Array, t: Array, s: Array, carry: Tree, keys: Array
    ) -> tuple[Array, Tree]:
        """From x at time t to (x at time s < t, carry).

        Args:
          denoise: (x, t) -> (x0, eps); may be called several times, at times above 0 only.
          schedule: alpha and sigma.
          x: f32[n,H,W,C].
          t: f32[], above 0.
          s: f32[], 0 in the last step.
          carry: as `init` made it or the step before returned it.
          keys: key[n], for this step alone.
        """
        ...


def solve(
    denoise: Denoiser, schedule: Schedule, solver: Solver, times: Array, steps: Array, x: Array, keys: Array
) -> Array:
    """Walk x f32[n,H,W,C] down `times` f32[MAX_STEPS + 1] in `steps` i32[] steps; keys key[n], one an image.

    One loop on the device whose length is traced: memory does not grow with the number of steps.
    """

    def body(i: Array, state: tuple[Array, Tree]) -> tuple[Array, Tree]:
        x, carry = state
        return solver.step(denoise, schedule, x, times[i], times[i + 1], carry, rng.fold(keys, i))

    return jax.lax.fori_loop(0, steps, body, (x, solver.init(x)))[0]
