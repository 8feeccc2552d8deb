"""Rules of guidance: what is done to the pushed result, and when nothing is pushed at all."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax.numpy as jnp

from diffusion_jax.diffusion.broadcast import over
from diffusion_jax.diffusion.solvers.base import pytree
from diffusion_jax.diffusion.thresholding import with_x0
from diffusion_jax.types import Array, Denoised, Tree


class Point(NamedTuple):
    """What a rule may look at.

    Attributes:
      alpha: f32[] or f32[n].
      sigma: f32[] or f32[n], above 0.
      weight: f32[], of the guidance.
      conditional: what the model to follow makes of x.
      other: what the model to move away from makes of x.
    """

    alpha: Array
    sigma: Array
    weight: Array
    conditional: Denoised
    other: Denoised


class Rule(ABC):
    """A change to what has been guided so far. A rule is a pytree: its float options are leaves."""

    def begin(self, x: Array) -> Tree:
        """What it remembers before the first step, for x f32[n,H,W,C]; () where it remembers nothing."""
        return ()

    def recall(self, point: Point, guided: Denoised, memory: Tree) -> tuple[Denoised, Tree]:
        """A new result, and what is remembered at the next step."""
        return self(point, guided), memory

    idle_at_one: ClassVar[bool] = True
    """Whether the conditional model is the result at weight 1, so that the other need not be asked."""

    def closed(self, ratio: Array) -> Array:
        """Where sigma / alpha f32[] or f32[n] closes all guidance, whatever other rules say: bool[] or bool[n]."""
        return jnp.zeros_like(ratio, bool)

    @abstractmethod
    def __call__(self, point: Point, guided: Denoised) -> Denoised:
        """A new result from what is `guided` so far."""


@pytree
@dataclass(frozen=True, kw_only=True)
class Interval(Rule):
    """Guide where low < sigma / alpha <= high only (Kynkaanniemi et al. 2024, whose alpha is 1).

    Elsewhere the conditional model is the result and is evaluated alone, wherever in the list of rules this one stands.
    low = high covers nothing.
    """

    low: float = 0.0
    high: float = math.inf

    def __post_init__(self) -> None:
        if isinstance(self.low, float) and isinstance(self.high, float) and not 0.0 <= self.low <= self.high:
            raise ValueError(f"needs 0 <= low <= high, not {self.low} and {self.high}")

    def closed(self, ratio: Array) -> Array:  # noqa: D102
        return (ratio <= self.low) | (ratio > self.high)

    def __call__(self, point: Point, guided: Denoised) -> Denoised:  # noqa: D102
        return guided


@pytree
@dataclass(frozen=True, kw_only=True)
class Rescaled(Rule):
    """Draw x0's standard deviation over an image towards the conditional model's (Lin et al. 2023, section 3.4).

    rescaled = guided std(conditional) / std(guided), of which the share phi is taken. Large weights brighten less.
    The paper rescales what its network predicts; here it is x0 for every prediction, and eps is derived again.
    """

    phi: float = 0.7

    def __post_init__(self) -> None:
        if isinstance(self.phi, float) and not 0.0 <= self.phi <= 1.0:
            raise ValueError(f"phi must lie in [0, 1], not {self.phi}")

    def __call__(self, point: Point, guided: Denoised) -> Denoised:  # noqa: D102
        std = lambda d: jnp.std(d.x0, axis=(1, 2, 3), keepdims=True)
        flat = std(guided) == 0.0  # an image of one colour has no deviation to draw anywhere
        ratio = std(point.conditional) / jnp.where(flat, 1.0, std(guided))
        factor = jnp.where(flat, 1.0, self.phi * ratio + (1.0 - self.phi))
        return with_x0(guided, factor * guided.x0, point.alpha, point.sigma)


@pytree
@dataclass(frozen=True, kw_only=True)
class APG(Rule):
    """Adaptive projected guidance (Sadat et al. 2024, section 4 and algorithm 1).

    The difference of the two models is summed up over the steps, so that a negative momentum pushes where it changes,

        sum <- (conditional - other) + momentum sum;

    the push is (weight - 1) sum, shortened to what it would be if the sum were no longer than `norm` over an image. Of
    its part parallel to the conditional x0, which saturates colours, the share eta is kept; the orthogonal part is kept
    whole. eps is derived again.

    The sum is renewed once a step, where the step begins; the paper's solvers ask nowhere else. What other rules
    changed before is part of the push.
    """

    eta: float = 0.0
    norm: float = math.inf
    momentum: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.norm, float) and not self.norm > 0.0:
            raise ValueError(f"norm must be positive, not {self.norm}")
        if isinstance(self.momentum, float) and not -1.0 < self.momentum < 1.0:
            raise ValueError(f"momentum must lie in (-1, 1), not {self.momentum}")

    def begin(self, x: Array) -> Array:  # noqa: D102
        return jnp.zeros_like(x)

    def __call__(self, point: Point, guided: Denoised) -> Denoised:  # noqa: D102
        return self.recall(point, guided, self.begin(guided.x0))[0]

    def recall(self, point: Point, guided: Denoised, memory: Array) -> tuple[Denoised, Array]:  # noqa: D102
        c, o = point.conditional.x0, point.other.x0
        past = self.momentum * memory
        total = c - o + past
        push = guided.x0 - c + over(point.weight - 1.0, past) * past
        push = push * jnp.minimum(1.0, self.norm / _at_least_tiny(_norm(total)))
        parallel = _dot(push, c) / _at_least_tiny(_dot(c, c)) * c
        x0 = c + (push - parallel) + self.eta * parallel
        return with_x0(guided, x0, point.alpha, point.sigma), total


@pytree
@dataclass(frozen=True, kw_only=True)
class CFGPlusPlus(Rule):
    """CFG++: x0 as guided, eps of the other model (Chung et al. 2024, algorithm 2), for weights in [0, 1].

    A step to s then lands on alpha_s x0 + sigma_s eps with the noise of the other model: a method for the solver ddim
    with eta = 0, which reads nothing but x0 and eps. One DDIM step is that of plain guidance of the weight
    w / (1 - alpha_t sigma_s / (alpha_s sigma_t)), which grows with the number of steps: there is no ODE behind it.
    At weight 1 x0 is the conditional model's, and eps is not: the other model is asked there, too. A threshold after
    it takes from x0 and gives to eps, as ever.
    """

    idle_at_one = False

    def __call__(self, point: Point, guided: Denoised) -> Denoised:  # noqa: D102
        return guided._replace(eps=point.other.eps)


def _dot(a: Array, b: Array) -> Array:
    return jnp.sum(a * b, axis=(1, 2, 3), keepdims=True)


def _norm(a: Array) -> Array:
    return jnp.sqrt(_dot(a, a))


def _at_least_tiny(a: Array) -> Array:
    """Divide by it where a may be 0 and the quotient's numerator is 0 with it."""
    return jnp.maximum(a, jnp.finfo(a.dtype).tiny)
