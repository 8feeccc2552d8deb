"""Guidance maps denoisers to a denoiser. So does clipping. They stack."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffusion_jax.diffusion.broadcast import over
from diffusion_jax.diffusion.schedule import Schedule
from diffusion_jax.types import Array, Denoised, Denoiser

LabelDenoiser = Callable[[Array, Array, Array], Denoised]
"""(x, t, label i32[n]) -> `Denoised`."""


def classifier_free(denoise: LabelDenoiser, label: Array, null: int, weight: Array) -> Denoiser:
    """uncond + weight (cond - uncond), from one doubled batch (Ho & Salimans 2022, eq. 6, with w = 1 + their w).

    Where `weight` is 1 the conditional half is computed alone: a branch at run time, so that the weight stays traced.
    The two halves lie side by side, example by example, so that a sharded batch stays where it is.

    Args:
      denoise: the model.
      label: i32[n].
      null: the label that stands for no label.
      weight: f32[], 1 for the plain conditional model.
    """
    n = label.shape[0]

    def guided(x: Array, t: Array) -> Denoised:
        both = jnp.stack([label, jnp.full_like(label, null)], axis=1).reshape(2 * n)
        doubled = jnp.repeat(x, 2, axis=0, total_repeat_length=2 * n)

        def mix(pair: Array) -> Array:
            conditional, unconditional = pair[0::2], pair[1::2]
            return unconditional + over(weight, x) * (conditional - unconditional)

        return jax.tree.map(mix, denoise(doubled, t, both))

    return lambda x, t: jax.lax.cond(weight == 1.0, lambda: denoise(x, t, label), lambda: guided(x, t))


def clip(denoise: Denoiser, schedule: Schedule, bound: Array) -> Denoiser:
    """Clip x0 to [-bound, bound], f32[], infinity for none, and derive eps again where that changed it.

    An eps that no longer belongs to x0 would push x off the path: (x0, eps) must stay a split of x (t above 0).
    """

    def clipped(x: Array, t: Array) -> Denoised:
        d = denoise(x, t)
        inside = jnp.clip(d.x0, -bound, bound)
        # x = alpha x0 + sigma eps: what x0 loses, eps gains.
        gained = over(schedule.alpha(t) / schedule.sigma(t), x) * (d.x0 - inside)
        return d._replace(x0=inside, eps=d.eps + gained)

    return clipped
