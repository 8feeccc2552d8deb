"""Penalties on how steep a discriminator is, an example at a time.

    R1 = gamma/2 |grad D(x)|^2 at real images          R2 = gamma/2 |grad D(x)|^2 at generated ones
    GP = weight (|grad D(x)| - 1)^2 between the two

grad is by the image's pixels, and |.| sums over them. All are added to the discriminator's loss alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp

from diffusion_jax import rng
from diffusion_jax.types import Array

Critic = Callable[[Array], Array]
"""x f32[n,H,W,C] -> D(x) f32[n]."""


class Regulariser(Protocol):
    """(critic, real f32[n,H,W,C], fake f32[n,H,W,C], keys key[n]) -> penalties f32[n].

    `every` is for `lazily`: the penalty counts in each `every`-th step only, and then so many times.
    """

    every: int

    def __call__(self, critic: Critic, real: Array, fake: Array, keys: Array) -> Array: ...  # noqa: D102


@dataclass(frozen=True, kw_only=True)
class R1:
    """gamma/2 |grad D|^2 at real images (Mescheder et al. 2018, eq. 9)."""

    gamma: float = 1.0
    every: int = 1

    def __post_init__(self) -> None:
        _check(self.every, gamma=self.gamma)

    def __call__(self, critic: Critic, real: Array, fake: Array, keys: Array) -> Array:  # noqa: D102
        return 0.5 * self.gamma * squared_slope(critic, real)


@dataclass(frozen=True, kw_only=True)
class R2:
    """gamma/2 |grad D|^2 at generated images (Mescheder et al. 2018, eq. 10)."""

    gamma: float = 1.0
    every: int = 1

    def __post_init__(self) -> None:
        _check(self.every, gamma=self.gamma)

    def __call__(self, critic: Critic, real: Array, fake: Array, keys: Array) -> Array:  # noqa: D102
        return 0.5 * self.gamma * squared_slope(critic, fake)


@dataclass(frozen=True, kw_only=True)
class GradientPenalty:
    """weight (|grad D| - 1)^2 at x = u real + (1 - u) fake, u uniform in [0, 1) (Gulrajani et al. 2017, eq. 3)."""

    weight: float = 10.0
    every: int = 1

    def __post_init__(self) -> None:
        _check(self.every, weight=self.weight)

    def __call__(self, critic: Critic, real: Array, fake: Array, keys: Array) -> Array:  # noqa: D102
        u = rng.uniform(keys)[:, None, None, None]
        squared = squared_slope(critic, u * real + (1.0 - u) * fake)
        slope = jnp.sqrt(jnp.maximum(squared, 1e-12))  # the root's own derivative is infinite at 0
        return self.weight * (slope - 1.0) ** 2


def _check(every: int, **weight: float) -> None:
    ((name, value),) = weight.items()
    if not value > 0.0:
        raise ValueError(f"{name} must be positive, not {value}")
    if every < 1:
        raise ValueError(f"every must be at least 1, not {every}")


REGULARISERS = {"r1": R1, "r2": R2, "gradient_penalty": GradientPenalty}


def squared_slope(critic: Critic, x: Array) -> Array:
    """|grad D(x_i)|^2 f32[n], for a critic whose output i depends on image i alone.

    The gradient of the sum then has the gradient of D(x_i) in row i. Under StyleGAN2's minibatch standard deviation it
    is that of the sum over i's group, as in its published code, which takes the gradient of the sum, too.
    """
    gradient = jax.grad(lambda x: jnp.sum(critic(x)))(x)
    return jnp.sum(jnp.square(gradient), axis=(1, 2, 3))


def lazily(every: int, step: Array, penalty: Callable[[], Array]) -> Array:
    """`every` times the penalty f32[n] in each `every`-th step i32[], else 0: the same on average, at less cost.

    Karras et al. 2020 (StyleGAN2), section 3.1. The published code gives it an optimizer step of its own, and for these
    further steps lowers Adam's rate and betas. Here it is a part of the step's loss: no step more, nothing to correct.
    """
    if every == 1:
        return penalty()
    shape = jax.eval_shape(penalty)
    return jax.lax.cond(step % every == 0, lambda: every * penalty(), lambda: jnp.zeros(shape.shape, shape.dtype))
