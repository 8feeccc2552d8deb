"""Dormand & Prince's Runge-Kutta method of order 5, whose steps adapt to an error that is told by order 4.

Every image has steps of its own, so none depends on the batch it is in, as it would with one error norm for all.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffusion_jax.diffusion.broadcast import over
from diffusion_jax.types import Array

# Dormand & Prince 1980 (Hairer, Norsett & Wanner 1993, table II.5.2)
NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
STAGES = (
    (1 / 5, 0, 0, 0, 0, 0, 0),
    (3 / 40, 9 / 40, 0, 0, 0, 0, 0),
    (44 / 45, -56 / 15, 32 / 9, 0, 0, 0, 0),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729, 0, 0, 0),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656, 0, 0),
    (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0),
)
"""The last row is the part's end, of order 5, whose slope is the next part's first."""
ERROR = (71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
"""The weights of order 5 less those of order 4."""
SHORTEST = 1e-5
"""A part this short, of the way from t to s, is taken whatever its error: the loop ends."""


def integrate(
    slope: Callable[[Array, Array], Array], way: Array, y: Array, rtol: Array, atol: Array
) -> tuple[Array, Array]:
    """y and its slope at the end of `way`, in parts whose errors are below atol + rtol |y|, as a root mean square.

    Args:
      slope: (the part f[n] of the way that each image has behind it, y) -> dy / d tau.
      way: f[], how far tau goes; it may be negative.
      y: f[n,H,W,C] at the start.
      rtol: f[], above 0.
      atol: f[], above 0.
    """
    nodes, stages, difference = (jnp.asarray(table, y.dtype) for table in (NODES, STAGES, ERROR))

    def attempt(state: tuple[Array, ...]) -> tuple[Array, ...]:
        y, first, left, length = state
        length = jnp.minimum(length, left)

        def along(weights: Array, slopes: Array) -> Array:
            return over(length * way.astype(length.dtype), y) * jnp.sum(over(weights, slopes) * slopes, axis=0)

        def stage(i: Array, slopes: Array) -> Array:
            done = 1.0 - left + nodes[i].astype(left.dtype) * length
            return slopes.at[i + 1].set(slope(done, y + along(stages[i], slopes)))

        slopes = jax.lax.fori_loop(0, 6, stage, jnp.zeros((7, *y.shape), y.dtype).at[0].set(first))
        new = y + along(stages[5], slopes)
        error = along(difference, slopes) / (atol + rtol * jnp.maximum(jnp.abs(y), jnp.abs(new)))
        size = jnp.sqrt(jnp.mean(error**2, axis=tuple(range(1, y.ndim)))).astype(left.dtype)
        taken = ~(size > 1.0) | (length <= SHORTEST)  # what is not a number is taken too, and stays visible
        y, first = (jnp.where(over(taken, y) > 0, a, b) for a, b in ((new, y), (slopes[6], first)))
        # the length at which the error, of order 5 in it, would be just below 1 (Hairer et al., eq. II.4.13)
        change = jnp.clip(0.9 * size**-0.2, 0.2, 5.0)
        return y, first, jnp.where(taken, left - length, left), jnp.maximum(length * change, SHORTEST)

    whole = jnp.ones(len(y), jnp.result_type(float))
    state = (y, slope(0.0 * whole, y), whole, whole)
    y, last, _, _ = jax.lax.while_loop(lambda state: jnp.any(state[2] > 0.0), attempt, state)
    return y, last
