"""UniPC, predictor and corrector in log-SNR, in x0, with B_2(h) = e^h - 1 (Zhao et al. 2023)."""

from dataclasses import dataclass

import jax.numpy as jnp

from diffusion_jax.diffusion.broadcast import over
from diffusion_jax.diffusion.schedule import Schedule
from diffusion_jax.diffusion.solvers.base import pytree
from diffusion_jax.diffusion.solvers.log_steps import ddim, exponential_moments, log_step
from diffusion_jax.diffusion.solvers.memory import Memory, behind, beyond_first, empty
from diffusion_jax.types import Array, Denoiser, Tree


@pytree
@dataclass(frozen=True, kw_only=True)
class UniPC:
    """UniPC-p: p = `order` (2 or 3) is the predictor's order, p + 1 that of the whole; one evaluation a step.

    x_s = alpha_s x0 + sigma_s eps + alpha_s B_2(h) sum_m a_m D_m / r_m, in x0, where h is -h. The conditions on a_m
    (their theorem 3.1), solved as they stand, give the integral of the polynomial through x0 and its differences D_m,
    and B_2 cancels; a single difference has a_1 = 1/2. The predictor (UniP, algorithm 2) looks back on p - 1 steps. The
    evaluation at s then serves twice: with it as one difference more the corrector (UniC, algorithm 1) does the step
    to s again, and the predictor goes on from there. The last stop stays as predicted. DDIM in the first step, and in
    steps from alpha = 0 or to sigma = 0. That start does not count in the noise; encoding is of order 3 at most.
    """

    order: int = 2

    def __post_init__(self) -> None:
        if self.order not in (2, 3):
            raise ValueError(f"order must be 2 or 3, not {self.order}")

    def init(self, x: Array) -> tuple[Memory, Array]:  # noqa: D102
        return empty(x, self.order), jnp.zeros_like(x)

    def step(  # noqa: D102
        self, denoise: Denoiser, schedule: Schedule, x: Array, t: Array, s: Array, carry: Tree, keys: Array
    ) -> tuple[Array, Tree]:
        memory, predicted = carry
        d = denoise(x, t)
        last, *older = memory.values
        nodes = [memory.steps[0], *behind(memory.steps[1:])]
        again = _added((last, d.x0, *older), nodes, memory.steps, memory.steps[0])
        change = over(schedule.alpha(t), x) * again - predicted
        corrected = d._replace(eps=d.eps + change / over(schedule.sigma(t), x))  # x + change = alpha x0 + sigma eps

        h, steps = log_step(schedule, t, s), memory.steps[:-1]
        added = _added((d.x0, *memory.values[:-1]), behind(steps), steps, h)
        predicted = over(schedule.alpha(s), x) * added
        return ddim(schedule, corrected, s) + predicted, (memory.push(d.x0, h), predicted)


def _added(values: tuple[Array, ...], nodes: list[Array], steps: tuple[Array, ...], h: Array) -> Array:
    """B_2(h) sum_m a_m D_m / r_m, for the differences from values[0] at `nodes`, as far as `steps` recall them."""
    moments = exponential_moments(h, len(values))
    alone = True if len(steps) == 1 else (steps[0] == 0.0) | (steps[1] == 0.0)
    return beyond_first(values, nodes, steps, moments.at[1].set(jnp.where(alone, 0.5 * h * moments[0], moments[1])))
