"""What a solver is, and the loops that run it: from noise to an image, the same with all stops kept, and back."""

from dataclasses import fields
from typing import Protocol, TypeVar

import jax
import jax.numpy as jnp

from diffusion_jax import rng
from diffusion_jax.diffusion.schedule import Schedule, first_time
from diffusion_jax.types import Array, Denoiser, Tree

T = TypeVar("T")


def pytree(cls: type[T]) -> type[T]:
    """Register a frozen dataclass as a pytree: float fields are its leaves, the others part of its structure.

    `jax.tree_util.register_dataclass` (jax 0.10 to 0.12) takes two classes with equal fields for one structure, and a
    jitted function may then run the wrong solver's program; here the class's name is part of the structure.
    """
    leaves = [field.name for field in fields(cls) if field.type is float]
    kept = [field.name for field in fields(cls) if field.type is not float]

    def flatten(solver: T) -> tuple[tuple, tuple]:
        return tuple(getattr(solver, n) for n in leaves), (cls.__qualname__, *(getattr(solver, n) for n in kept))

    def unflatten(structure: tuple, values: tuple) -> T:
        solver = object.__new__(cls)  # leaves may be anything while jax moves them about: no check of ranges here
        for name, value in zip([*leaves, *kept], [*values, *structure[1:]], strict=True):
            object.__setattr__(solver, name, value)
        return solver

    jax.tree_util.register_pytree_node(cls, flatten, unflatten)
    return cls


class Solver(Protocol):
    """A solver is a pytree: its float options are leaves, so changing them does not compile again."""

    def init(self, x: Array) -> Tree:
        """The carry before the first step: fixed buffers where the solver has a memory, () where not."""
        ...

    def step(
        self, denoise: Denoiser, schedule: Schedule, x: Array, t: Array, s: Array, carry: Tree, keys: Array
    ) -> tuple[Array, Tree]:
        """From x at time t to (x at time s, carry). s is below t, or above it where an image is encoded.

        Args:
          denoise: (x, t) -> `Denoised`; may be called several times, at times above 0 only.
          schedule: alpha and sigma.
          x: f32[n,H,W,C].
          t: f32[], above 0.
          s: f32[], 0 in the last step of sampling.
          carry: as `init` made it or the step before returned it.
          keys: key[n], for this step alone.
        """
        ...


def solve(
    denoise: Denoiser, schedule: Schedule, solver: Solver, times: Array, steps: Array, x: Array, keys: Array
) -> Array:
    """Walk x f32[n,H,W,C] along `times` f32[MAX_STEPS + 1] in `steps` i32[] steps; keys key[n], one an image.

    One loop on the device whose length is traced: memory does not grow with the number of steps.
    """

    def body(i: Array, state: tuple[Array, Tree]) -> tuple[Array, Tree]:
        x, carry = state
        return solver.step(denoise, schedule, x, times[i], times[i + 1], carry, rng.fold(keys, i))

    return jax.lax.fori_loop(0, steps, body, (x, solver.init(x)))[0]


def trajectory(
    denoise: Denoiser, schedule: Schedule, solver: Solver, times: Array, steps: int, x: Array, keys: Array
) -> Array:
    """All stops of `solve`, f32[steps + 1,n,H,W,C] from x on. `steps` is a Python number: it is a shape."""

    def body(state: tuple[Array, Tree], i: Array) -> tuple[tuple[Array, Tree], Array]:
        x, carry = state
        state = solver.step(denoise, schedule, x, times[i], times[i + 1], carry, rng.fold(keys, i))
        return state, state[0]

    _, stops = jax.lax.scan(body, (x, solver.init(x)), jnp.arange(steps))
    return jnp.concatenate([x[None], stops])


def reverse(schedule: Schedule, times: Array, steps: Array) -> Array:
    """The grid of `times` f32[MAX_STEPS + 1] backwards, from the image to the noise.

    Its first stop is `first_time`, where the image is there already, and not 0, where no denoiser is defined.
    """
    stops = jnp.take(times, jnp.maximum(steps - jnp.arange(len(times), dtype=steps.dtype), 0))
    return stops.at[0].set(jnp.minimum(first_time(schedule).astype(times.dtype), 0.5 * stops[1]))
