"""Guidance maps denoisers to a denoiser.

Two models are looked at in one point (a pair); the first is pushed away from the second,

    guided = other + weight (conditional - other);

rules change the result, in the order in which they are written. The result is a denoiser again, so guidances stack: the
first of a pair may itself be guided.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax.diffusion.broadcast import over
from diffusion_jax.diffusion.guidance.memory import Guided, as_guided
from diffusion_jax.diffusion.guidance.rules import Point, Rule
from diffusion_jax.diffusion.schedule import Schedule
from diffusion_jax.types import Array, Denoised, Denoiser, LabelDenoiser, Tree


class Pair(NamedTuple):
    """The model to follow, and the model to move away from.

    Attributes:
      conditional: the model to follow, alone.
      both: (x, t, the conditional one's memory) -> ((conditional, other) in the same point, the memory after it).
    """

    conditional: Guided
    both: Callable[[Array, Array, Tree], tuple[tuple[Denoised, Denoised], Tree]]


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

    def both(x: Array, t: Array, memory: Tree) -> tuple[tuple[Denoised, Denoised], Tree]:
        labels = jnp.stack([label, jnp.full_like(label, null)], axis=1).reshape(2 * n)
        doubled = jnp.repeat(x, 2, axis=0, total_repeat_length=2 * n)
        times = jnp.repeat(t, 2, total_repeat_length=2 * n) if t.ndim else t
        d = denoise(doubled, times, labels)
        return (jax.tree.map(lambda a: a[0::2], d), jax.tree.map(lambda a: a[1::2], d)), memory

    return Pair(conditional=as_guided(lambda x, t: denoise(x, t, label)), both=both)


def strong_and_weak(strong: Denoiser, weak: Denoiser) -> Pair:
    """A model and a worse one under the same label: autoguidance (Karras et al. 2024, "a bad version of itself").

    The worse one is smaller or less trained, and makes the same errors more strongly. The better one may be guided.
    """
    strong = as_guided(strong)

    def both(x: Array, t: Array, memory: Tree) -> tuple[tuple[Denoised, Denoised], Tree]:
        followed, memory = strong.recall(x, t, memory)
        return (followed, weak(x, t)), memory

    return Pair(conditional=strong, both=both)


def guide(pair: Pair, schedule: Schedule, weight: Array, rules: Sequence[Rule] = ()) -> Guided:
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

    def begin(x: Array) -> Tree:
        return pair.conditional.begin(x), tuple(rule.begin(x) for rule in rules)

    def recall(x: Array, t: Array, memory: Tree) -> tuple[Denoised, Tree]:
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        before, memories = memory
        alone = (weight == 1.0) & all(rule.idle_at_one for rule in rules)
        for rule in rules:
            alone = alone | rule.closed(sigma / alpha)

        def by_one() -> tuple[Denoised, Tree]:
            d, after = pair.conditional.recall(x, t, before)
            return d, (after, memories)

        def by_both() -> tuple[Denoised, Tree]:
            (conditional, other), after = pair.both(x, t, before)
            point = Point(alpha, sigma, weight, conditional, other)
            d, renewed = extrapolate(point), []
            for rule, memory in zip(rules, memories, strict=True):
                d, memory = rule.recall(point, d, memory)
                renewed.append(memory)
            # Each image has its own t, and the conditional model is the result for some of them only.
            keep = lambda old, new: jnp.where(over(alone, new) > 0.0, old, new)
            return jax.tree.map(keep, conditional, d), (after, jax.tree.map(keep, memories, tuple(renewed)))

        return jax.lax.cond(jnp.all(alone), by_one, by_both)

    return Guided(begin=begin, recall=recall)


def extrapolate(point: Point) -> Denoised:
    """other + weight (conditional - other), in x0 and in eps."""
    mix = lambda c, o: o + over(point.weight, o) * (c - o)
    c, o = point.conditional, point.other
    return c._replace(x0=mix(c.x0, o.x0), eps=mix(c.eps, o.eps))
