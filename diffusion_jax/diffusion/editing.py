"""Editing that needs no retraining: a trained denoiser, walked along other paths than from noise to an image.

    encode, decode    image -> noise -> image, by the probability-flow ODE, for the walks of `latents`
    vary              noise an image part of the way and walk down from there: img2img
    inpaint           keep the known pixels of an image and make the others

Each image depends on its own row and key alone; the same keys make the same images. Nothing is clipped at the end.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax import rng
from diffusion_jax.diffusion.broadcast import over
from diffusion_jax.diffusion.schedule import Schedule
from diffusion_jax.diffusion.solvers.base import Solver, reverse, solve
from diffusion_jax.diffusion.solvers.kernel import forward_kernel
from diffusion_jax.types import Array, Denoiser, Tree


class Walk(NamedTuple):
    """A way from noise to an image.

    Attributes:
      denoise: the model, guided and bound to its labels.
      schedule: its schedule.
      solver: from `solvers.SOLVERS`; encoding needs one of an ODE.
      times: f32[MAX_STEPS + 1], a grid.
      steps: i32[], of the grid.
    """

    denoise: Denoiser
    schedule: Schedule
    solver: Solver
    times: Array
    steps: Array


def noised(schedule: Schedule, image: Array, t: Array, noise: Array) -> Array:
    """x_t = alpha x0 + sigma eps, for image and noise f32[n,H,W,C]."""
    return over(schedule.alpha(t), image) * image + over(schedule.sigma(t), noise) * noise


# ---------------------------------------------------------------------------------------------- there and back


def decode(walk: Walk, noise: Array, keys: Array) -> Array:
    """The images f32[n,H,W,C] that noise f32[n,H,W,C] of unit variance leads to; keys key[n] for the solver."""
    return solve(*walk, first_stop(walk, noise), keys)


def first_stop(walk: Walk, noise: Array) -> Array:
    """x at the walk's first stop: noise alone, for what the schedule leaves of the image there is unknown."""
    return over(walk.schedule.sigma(walk.times[0]), noise) * noise


def encode(walk: Walk, image: Array, keys: Array) -> Array:
    """The noise f32[n,H,W,C] that `decode` leads to `image` (Song et al. 2021, section 4.3), up to the solver's error.

    The same grid backwards, with a solver of an ODE: one that draws noise cannot be walked back. It starts at
    `first_time`, where the noise in x = alpha x0 + sigma eps is too small to matter, and alpha is not yet 1.
    """
    times = reverse(walk.schedule, walk.times, walk.steps)
    x = over(walk.schedule.alpha(times[0]), image) * image
    x = solve(*walk._replace(times=times), x, keys)
    return x / over(walk.schedule.sigma(walk.times[0]), x)


# ---------------------------------------------------------------------------------------------- from part of the way


def vary(walk: Walk, image: Array, strength: Array, noise: Array, keys: Array) -> Array:
    """SDEdit, also called img2img: noise `image` f32[n,H,W,C] to the time `strength`, walk down (Meng et al. 2022).

    Args:
      walk: the way down.
      image: f32[n,H,W,C] in [-1, 1].
      strength: f32[], a time in [0, 1]. 0 returns the image; at 1, or wherever the grid begins, what is left of the
        image in x is what the schedule leaves: nothing where alpha(1) = 0, and then this is plain sampling.
      noise: f32[n,H,W,C], of unit variance.
      keys: key[n], for the solver.
    """
    times, steps = begin_at(walk.times, walk.steps, strength)
    x = noised(walk.schedule, image, times[0], noise)
    return solve(*walk._replace(times=times, steps=steps), x, keys)


def begin_at(times: Array, steps: Array, start: Array) -> tuple[Array, Array]:
    """The grid that begins at `start` f32[] exactly and goes on with the stops below: (times, steps).

    A start above the grid's own is the grid's own. The share of the steps that is left is `start`'s on a uniform grid.
    """
    start = jnp.minimum(jnp.asarray(start, times.dtype), times[0])
    passed = jnp.sum(times >= start, dtype=steps.dtype)
    stops = jnp.arange(len(times), dtype=steps.dtype) + passed - 1
    rest = jnp.take(times, jnp.minimum(stops, len(times) - 1))
    return rest.at[0].set(start), steps - (passed - 1)


# ---------------------------------------------------------------------------------------------- part of the pixels


def inpaint(walk: Walk, image: Array, known: Array, noise: Array, keys: Array, resamplings: Array) -> Array:
    """Keep the known pixels of `image` and make the others.

    After each step the known pixels are replaced by those of the image, noised to the step's end (Song et al. 2021,
    section 5 and appendix I.2). The others have then been made for other known pixels than they stand beside. RePaint
    (Lugmayr et al. 2022, algorithm 1) repeats each step: noise x_s again to time t, and walk down once more.

        x_t = alpha_t / alpha_s x_s + noise        with known and unknown pixels, which now fit a little better

    Repeated often, in small steps, this draws from the data given the known pixels if the solver's noise is as large
    as that of the step back: with "ddpm(variance=1.0)". Solvers with less noise, and those of an ODE, come to the right
    mean, but to too small a spread unless the steps are very small. The step to s = 0 is not repeated, as in the paper:
    it adds no noise. A solver's memory of earlier steps is that of the last repetition.

    Args:
      walk: the way from noise to an image.
      image: f32[n,H,W,C] in [-1, 1]; only its known pixels are looked at.
      known: bool[n,H,W,1] or bool[n,H,W,C].
      noise: f32[n,H,W,C], of unit variance, to begin with.
      keys: key[n], for all that is drawn on the way.
      resamplings: i32[], how often each step is walked, 1 for plain replacement.
    """
    denoise, schedule, solver, times, steps = walk
    shape, dtype = image.shape[1:], image.dtype

    def step(i: Array, state: tuple[Array, Tree]) -> tuple[Array, Tree]:
        x, carry = state
        t, s = times[i], times[i + 1]

        def down(j: Array, state: tuple[Array, Tree]) -> tuple[Array, Tree]:
            own = rng.fold(rng.fold(keys, i + 1), j)
            back = lambda: noise_again(schedule, state[0], s, t, rng.fold(own, 0))
            x_t = jax.lax.cond(j > 0, back, lambda: x)
            x_s, after = solver.step(denoise, schedule, x_t, t, s, carry, rng.fold(own, 1))
            of_image = noised(schedule, image, s, rng.normal(rng.fold(own, 2), shape, dtype))
            return jnp.where(known, of_image, x_s), after

        return jax.lax.fori_loop(0, jnp.where(s > 0.0, resamplings, 1), down, (x, carry))

    x = first_stop(walk, noise)
    x, _ = jax.lax.fori_loop(0, steps, step, (x, solver.init(x)))
    return jnp.where(known, image, x)


def noise_again(schedule: Schedule, x: Array, s: Array, t: Array, keys: Array) -> Array:
    """x_t from x_s by the forward process, x_t = a x_s + sqrt(1 - r) sigma_t z (see `solvers.kernel`)."""
    a, r = forward_kernel(schedule, s, t)
    z = rng.normal(keys, x.shape[1:], x.dtype)
    return over(a, x) * x + over(jnp.sqrt(1.0 - r) * schedule.sigma(t), x) * z
