"""Denoisers that remember what they saw at the steps before, and the solver that carries their memory.

A denoiser is a function of (x, t) alone. Some guidance looks back (APG averages its push over the steps), so what
guides is a function (x, t, memory) -> (denoised, memory), which is a denoiser for each memory. The memory changes once
a step, where the step begins, and lives in the solver's carry.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax

from diffusion_jax.diffusion.schedule import Schedule
from diffusion_jax.diffusion.solvers.base import Solver
from diffusion_jax.types import Array, Denoised, Denoiser, Tree


@dataclass(frozen=True, kw_only=True)
class Guided:
    """A denoiser with a memory.

    Attributes:
      begin: x f32[n,H,W,C] -> the memory before the first step; () where there is none.
      recall: (x, t, memory) -> (`Denoised`, the memory after it).
    """

    begin: Callable[[Array], Tree]
    recall: Callable[[Array, Array, Tree], tuple[Denoised, Tree]]

    def __call__(self, x: Array, t: Array) -> Denoised:
        """The denoiser before the first step."""
        return self.recall(x, t, self.begin(x))[0]

    def then(self, change: Callable[[Denoiser], Denoiser]) -> "Guided":
        """The same with each result changed, by a map of denoisers that asks for the point it is asked for."""

        def recall(x: Array, t: Array, memory: Tree) -> tuple[Denoised, Tree]:
            d, memory = self.recall(x, t, memory)
            return change(lambda *_: d)(x, t), memory

        return Guided(begin=self.begin, recall=recall)


def as_guided(denoise: Denoiser) -> Guided:
    """A denoiser as one with a memory, which stays empty if it had none."""
    if isinstance(denoise, Guided):
        return denoise
    return Guided(begin=lambda x: (), recall=lambda x, t, memory: (denoise(x, t), memory))


@dataclass(frozen=True, kw_only=True)
class Remembering:
    """A solver that carries the memory of a `Guided` denoiser beside its own.

    The memory is renewed by what the denoiser says where the step begins. Most solvers ask that first, and then it is
    one evaluation; to those that ask elsewhere, memory costs one more.
    """

    solver: Solver
    begin: Callable[[Array], Tree]

    def init(self, x: Array) -> Tree:  # noqa: D102
        return self.solver.init(x), self.begin(x)

    def step(  # noqa: D102
        self, denoise: Guided, schedule: Schedule, x: Array, t: Array, s: Array, carry: Tree, keys: Array
    ) -> tuple[Array, Tree]:
        own, memory = carry
        answer, renewed = denoise.recall(x, t, memory)
        asked = lambda y, u: y is x and u is t
        remembering = lambda y, u: answer if asked(y, u) else denoise.recall(y, u, memory)[0]
        x_s, own = self.solver.step(remembering, schedule, x, t, s, own, keys)
        return x_s, (own, renewed)


def carried(solver: Solver, denoise: Guided, x: Array) -> Solver:
    """`solver`, carrying the memory of `denoise` where it has one, for x f32[n,H,W,C]."""
    empty = not jax.tree.leaves(jax.eval_shape(denoise.begin, x))
    return solver if empty else Remembering(solver=solver, begin=denoise.begin)
