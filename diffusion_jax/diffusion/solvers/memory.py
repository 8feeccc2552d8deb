"""What a multistep solver recalls of its last steps, and the polynomial through it."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp

from diffusion_jax.diffusion.broadcast import over
from diffusion_jax.types import Array


class Memory(NamedTuple):
    """The latest stops, newest first. Empty places have a step of 0, and so have steps that cannot be looked back on.

    Attributes:
      values: f32[n,H,W,C] each, what the solver follows (x0, eps or a slope) at the stops before the present one.
      steps: f32[] each, in the solver's clock: steps[0] led to the present stop, steps[1] to the one before.
    """

    values: tuple[Array, ...]
    steps: tuple[Array, ...]

    def push(self, value: Array, step: Array) -> "Memory":
        """The memory one step later: `value` is that of the present stop, from which `step` leads on."""
        places = len(self.values)
        return Memory((value, *self.values)[:places], (step, *self.steps)[:places])


def empty(x: Array, places: int) -> Memory:
    """A memory of nothing yet."""
    return Memory((jnp.zeros_like(x),) * places, (jnp.zeros((), jnp.result_type(float)),) * places)


def ratio(a: Array | float, b: Array) -> Array:
    """a / b, and 0 where b is 0."""
    return jnp.where(b == 0.0, 0.0, a / jnp.where(b == 0.0, 1.0, b))


def beyond_first(values: Sequence[Array], nodes: Sequence[Array], steps: Sequence[Array], moments: Array) -> Array:
    """int K(u) (p(u) - p(0)) du, for p the polynomial through values[0] at u = 0 and values[j + 1] at nodes[j].

    In Newton's form, with u_0 = 0: p(u) = sum_j f[u_0 .. u_j] prod_{i<j} (u - u_i), one term more a value recalled.

    Args:
      values: f32[n,H,W,C] each.
      nodes: f32[] each, one less.
      steps: f32[] each, one less: where steps[j] is 0, values[j + 1] and all after it are left out.
      moments: f32[len(values)] or longer, int K(u) u^n du over the step.
    """
    zero = jnp.zeros((1,), moments.dtype)
    u, slopes = [zero[0], *nodes], list(values)
    basis, known, total = jnp.ones_like(zero), True, jnp.zeros_like(values[0])
    for j in range(1, len(values)):
        # f[u_i .. u_(i+j)] = (f[u_(i+1) .. u_(i+j)] - f[u_i .. u_(i+j-1)]) / (u_(i+j) - u_i)
        inverse = [over(ratio(1.0, u[i + j] - u[i]), total) for i in range(len(values) - j)]
        slopes = [inverse[i] * (slopes[i + 1] - slopes[i]) for i in range(len(values) - j)]
        # prod_{i<j} (u - u_i), as the coefficients of u^0, u^1, ...
        basis = jnp.append(zero, basis) - u[j - 1] * jnp.append(basis, zero)
        known = (steps[j - 1] != 0.0) & known
        weight = jnp.where(known, jnp.sum(basis * moments[: j + 1]), 0.0)
        total = total + over(weight, total) * slopes[0]
    return total


def behind(steps: Sequence[Array]) -> list[Array]:
    """Where the stops that `steps` led on from lie, seen from the present one: -h_1, -h_1 - h_2, ..."""
    return [-sum(steps[: j + 1]) for j in range(len(steps))]
