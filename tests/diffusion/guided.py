"""Gaussians under labels, whose ideal denoisers are known, and guidance of them: what its tests share."""

import functools

import jax
import jax.numpy as jnp

from diffusion_jax import plugs
from diffusion_jax.diffusion.guidance import (
    GUIDANCE_RULES,
    guide,
    with_and_without_label,
)
from diffusion_jax.diffusion.schedule import SCHEDULES
from diffusion_jax.types import Denoised

NULL = 9
NAMES = ("vp_linear", "cosine", "edm", "rectified_flow")
RULES = ("interval(low=0.3,high=3.0)", "rescaled(phi=0.6)", "apg(eta=0.2,norm=1.5,momentum=-0.5)", "cfg_pp")


def of(schedule, mean, std):
    """The ideal denoiser of N(mean, std^2) a pixel; mean and std may be one an example, and t too."""

    def denoise(x, t):
        alpha, sigma = (c.reshape(-1, 1, 1, 1).astype(x.dtype) for c in (schedule.alpha(t), schedule.sigma(t)))
        off = (x - alpha * mean) / (alpha**2 * std**2 + sigma**2)
        return Denoised(mean + alpha * std**2 * off, sigma * off)

    return denoise


def two_gaussians(schedule, m=0.4, s=0.3, S=0.8):  # noqa: N803
    """Under its label N(m, s^2), without one N(0, S^2)."""

    def denoise(x, t, label):
        null = (label == NULL).reshape(-1, 1, 1, 1)
        return of(schedule, jnp.where(null, 0.0, m).astype(x.dtype), jnp.where(null, S, s).astype(x.dtype))(x, t)

    return denoise


def rules_of(*texts):
    return tuple(plugs.build("sample.rules", text, GUIDANCE_RULES) for text in texts)


def guided(schedule, label, weight, rules=()):
    return guide(with_and_without_label(two_gaussians(schedule), label, NULL), schedule, weight, rules)


@functools.cache
def compiled(schedule, *texts):
    """(x, t, label, weight) -> the guided (x0, eps)."""
    return jax.jit(lambda x, t, label, weight: guided(schedule, label, weight, rules_of(*texts))(x, t)[:2])


def exact(x, t, label):
    """A model whose only roundings are its sums', so that no compiler may round it differently."""
    offset = label.astype(x.dtype).reshape(-1, 1, 1, 1)
    return Denoised(0.5 * x + offset, 2.0 * x - offset)


def guided_exact(x, label, weight, rules=(), ratio=1.0):
    """`exact` guided at the time at which rectified flow's sigma / alpha is `ratio`."""
    schedule = SCHEDULES["rectified_flow"]()
    pair = with_and_without_label(exact, label, NULL)
    return guide(pair, schedule, jnp.float32(weight), rules)(x, jnp.float32(ratio / (1.0 + ratio)))


def three(seed=0):
    return jax.random.normal(jax.random.key(seed), (3, 8, 8, 1)), jnp.int32([0, 3, 8])


def sizes_of_batches(weight, rules=(), ratio=1.0):
    """How many images the model is asked for: under disable_jit a branch runs only where it is taken."""
    sizes = []

    def denoise(x, t, label):
        sizes.append(x.shape[0])
        return Denoised(x, x)

    with jax.disable_jit():
        pair = with_and_without_label(denoise, jnp.int32([1, 2, 3]), NULL)
        run = guide(pair, SCHEDULES["rectified_flow"](), jnp.float32(weight), rules)
        run(jnp.ones((3, 2, 2, 1)), jnp.float32(ratio / (1.0 + ratio)))
    return sizes
