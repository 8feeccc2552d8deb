"""Guidance maps denoisers to a denoiser.

Read top to bottom: two models are looked at in one point (a pair); the first is pushed away from the second,

    guided = other + weight (conditional - other);

rules change the result, in the order in which they are written; then what each rule does. Guidance by a classifier's
gradient, which needs no second model, stands at the end. All results are denoisers again, so they stack.
"""

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax.diffusion.broadcast import over
from diffusion_jax.diffusion.schedule import Schedule
from diffusion_jax.diffusion.solvers.base import pytree
from diffusion_jax.diffusion.thresholding import with_x0
from diffusion_jax.types import Array, Denoised, Denoiser

LabelDenoiser = Callable[[Array, Array, Array], Denoised]
"""(x, t, label i32[n]) -> `Denoised`."""

# ---------------------------------------------------------------------------------------------- pairs


class Pair(NamedTuple):
    """The model to follow, and the model to move away from.

    Attributes:
      conditional: the model to follow, alone.
      both: (x, t) -> (conditional, other), both in the same point.
    """

    conditional: Denoiser
    both: Callable[[Array, Array], tuple[Denoised, Denoised]]


def with_and_without_label(denoise: LabelDenoiser, label: Array, null: int) -> Pair:
    """One model, with its label and without: classifier-free guidance (Ho & Salimans 2022, algorithm 2).

    Both come from one doubled batch. Its halves lie side by side, example by example, so that a sharded batch stays
    where it is.

    Args:
      denoise: the model.
      label: i32[n].
      null: the label that stands for no label.
    """
    n = label.shape[0]

    def both(x: Array, t: Array) -> tuple[Denoised, Denoised]:
        labels = jnp.stack([label, jnp.full_like(label, null)], axis=1).reshape(2 * n)
        doubled = jnp.repeat(x, 2, axis=0, total_repeat_length=2 * n)
        times = jnp.repeat(t, 2, total_repeat_length=2 * n) if t.ndim else t
        d = denoise(doubled, times, labels)
        return jax.tree.map(lambda a: a[0::2], d), jax.tree.map(lambda a: a[1::2], d)

    return Pair(conditional=lambda x, t: denoise(x, t, label), both=both)


def strong_and_weak(strong: Denoiser, weak: Denoiser) -> Pair:
    """A model and a worse one under the same label: autoguidance (Karras et al. 2024, "a bad version of itself").

    The worse one is smaller or less trained, and makes the same errors more strongly.
    """
    return Pair(conditional=strong, both=lambda x, t: (strong(x, t), weak(x, t)))


# ---------------------------------------------------------------------------------------------- pair to denoiser


class Point(NamedTuple):
    """What a rule may look at.

    Attributes:
      alpha: f32[] or f32[n].
      sigma: f32[] or f32[n], above 0.
      conditional: what the model to follow makes of x.
      other: what the model to move away from makes of x.
    """

    alpha: Array
    sigma: Array
    conditional: Denoised
    other: Denoised


class Rule(ABC):
    """A change to what has been guided so far. A rule is a pytree: its float options are leaves."""

    def alone(self, before: Array, ratio: Array) -> Array:
        """Whether the conditional model is the result, so that the other need not be asked: bool[] or bool[n].

        Args:
          before: whether it was the result before this rule.
          ratio: sigma / alpha, f32[] or f32[n].
        """
        return before

    @abstractmethod
    def __call__(self, point: Point, guided: Denoised) -> Denoised:
        """A new result from what is `guided` so far."""


def guide(pair: Pair, schedule: Schedule, weight: Array, rules: Sequence[Rule] = ()) -> Denoiser:
    """other + weight (conditional - other), changed by `rules` in their order.

    Ho & Salimans 2022, eq. 6, whose w is one less than this weight.
    At weight 1 the result is the conditional model and at 0 the other, to the bit. Where the conditional model is the
    result, it is evaluated alone: a branch at run time, so that the weight and the rules' options stay traced.
    A learned variance (`Denoised.spread`) is the conditional model's.

    Args:
      pair: the two models.
      schedule: their schedule.
      weight: f32[].
      rules: built from `GUIDANCE_RULES`.
    """

    def guided(x: Array, t: Array) -> Denoised:
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)

        def by_both() -> Denoised:
            point = Point(alpha, sigma, *pair.both(x, t))
            return functools.reduce(lambda d, rule: rule(point, d), rules, extrapolate(point, weight))

        alone = functools.reduce(lambda before, rule: rule.alone(before, sigma / alpha), rules, weight == 1.0)
        return jax.lax.cond(jnp.all(alone), lambda: pair.conditional(x, t), by_both)

    return guided


def extrapolate(point: Point, weight: Array) -> Denoised:
    """other + weight (conditional - other), in x0 and in eps."""
    mix = lambda c, o: o + over(weight, o) * (c - o)
    c, o = point.conditional, point.other
    return c._replace(x0=mix(c.x0, o.x0), eps=mix(c.eps, o.eps))


# ---------------------------------------------------------------------------------------------- rules


@pytree
@dataclass(frozen=True, kw_only=True)
class Interval(Rule):
    """Guide where low < sigma / alpha <= high only (Kynkaanniemi et al. 2024, whose alpha is 1).

    Elsewhere the conditional model is the result and is evaluated alone. low = high covers nothing.
    """

    low: float = 0.0
    high: float = math.inf

    def __post_init__(self) -> None:
        if isinstance(self.low, float) and isinstance(self.high, float) and not 0.0 <= self.low <= self.high:
            raise ValueError(f"needs 0 <= low <= high, not {self.low} and {self.high}")

    def alone(self, before: Array, ratio: Array) -> Array:  # noqa: D102
        return before | (ratio <= self.low) | (ratio > self.high)

    def __call__(self, point: Point, guided: Denoised) -> Denoised:  # noqa: D102
        outside = self.alone(jnp.bool_(False), point.sigma / point.alpha)
        select = lambda c, g: jnp.where(over(outside, g) > 0.0, c, g)
        return jax.tree.map(select, point.conditional, guided)


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
    """Adaptive projected guidance without its momentum (Sadat et al. 2024, section 4).

    The push away from the other model, guided - conditional, is first shortened to what it would be if conditional -
    other were no longer than `norm`, over an image. Of its part parallel to the conditional x0, which saturates
    colours, the share eta is kept; the orthogonal part is kept whole. eps is derived again.

    The paper's momentum averages the push over the steps. It needs a memory between evaluations, which a denoiser does
    not have; it is left out.
    """

    eta: float = 0.0
    norm: float = math.inf

    def __post_init__(self) -> None:
        if isinstance(self.norm, float) and not self.norm > 0.0:
            raise ValueError(f"norm must be positive, not {self.norm}")

    def __call__(self, point: Point, guided: Denoised) -> Denoised:  # noqa: D102
        c, o = point.conditional.x0, point.other.x0
        push = guided.x0 - c
        push = push * jnp.minimum(1.0, self.norm / _at_least_tiny(_norm(c - o)))
        parallel = _dot(push, c) / _at_least_tiny(_dot(c, c)) * c
        return with_x0(guided, c + (push - parallel) + self.eta * parallel, point.alpha, point.sigma)


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

    def alone(self, before: Array, ratio: Array) -> Array:  # noqa: D102
        return jnp.zeros_like(before)

    def __call__(self, point: Point, guided: Denoised) -> Denoised:  # noqa: D102
        return guided._replace(eps=point.other.eps)


GUIDANCE_RULES = {"interval": Interval, "rescaled": Rescaled, "apg": APG, "cfg_pp": CFGPlusPlus}


def _dot(a: Array, b: Array) -> Array:
    return jnp.sum(a * b, axis=(1, 2, 3), keepdims=True)


def _norm(a: Array) -> Array:
    return jnp.sqrt(_dot(a, a))


def _at_least_tiny(a: Array) -> Array:
    """Divide by it where a may be 0 and the quotient's numerator is 0 with it."""
    return jnp.maximum(a, jnp.finfo(a.dtype).tiny)


# ---------------------------------------------------------------------------------------------- classifiers


def by_classifier(
    denoise: Denoiser, schedule: Schedule, log_probability: Callable[[Array, Array], Array], weight: Array
) -> Denoiser:
    """Push x towards what a classifier of noisy images takes for the label (Dhariwal & Nichol 2021, eq. 14).

    With g = grad_x log p(y | x, t):  eps' = eps - weight sigma g,  and so  x0' = x0 + weight sigma^2 / alpha g.

    Where alpha is 0, x holds nothing of the image, so that g is 0 and the second term 0 / 0: both are left out, and the
    first step from there is the unguided model's.

    Args:
      denoise: the model, without a label.
      schedule: its schedule.
      log_probability: (x, t) -> f32[n], log p(y | x_t = x) of the label that each image is to show, up to a constant.
      weight: f32[]; at 1 the result is Bayes' posterior, if model and classifier are exact.
    """

    def guided(x: Array, t: Array) -> Denoised:
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        d = denoise(x, t)
        gradient = jax.grad(lambda x: jnp.sum(log_probability(x, t)))(x)
        push = over(weight, x) * over(jnp.where(alpha > 0.0, sigma, 0.0), x) * gradient
        ratio = sigma / jnp.where(alpha > 0.0, alpha, 1.0)
        return d._replace(x0=d.x0 + over(ratio, x) * push, eps=d.eps - push)

    return guided
