"""Likelihood of images under a diffusion model, in bits per dimension: two rows, `flow` and `bound`.

Images are discrete: `levels` equidistant grey levels from -1 to 1. The model is a density of continuous x.

- `flow` follows the probability-flow ODE from the image to the noise and adds up by how much it stretches space
  (Chen et al. 2018, eq. 8; Song et al. 2021, section 4.3). Uniform noise of one level's width makes the image
  continuous; by Jensen's inequality the mean of -log p bounds the discrete image's -log P (Theis et al. 2016).
- `bound` is the variational bound of the stochastic process in continuous time (Kingma et al. 2021), whose decoder
  gives probabilities of levels at once.

`flow` takes the data to be the model's x at `first_time`, where sigma / alpha is 1/1000, divided by alpha: no denoiser
is defined at t = 0. `bound` begins where the levels can just be told apart. The other end is the noise N(0, sigma(1)^2)
that sampling starts from.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp

from diffusion_jax import grey, rng
from diffusion_jax.diffusion.broadcast import over
from diffusion_jax.diffusion.schedule import Schedule, first_time, logsnr
from diffusion_jax.diffusion.straight import Straight
from diffusion_jax.types import Array, Denoiser


class Likelihood(Protocol):
    """A row of `LIKELIHOODS`."""

    def __call__(self, denoise: Denoiser, schedule: Schedule, x0: Array, keys: Array, levels: int) -> Array:
        """Bits per dimension f[n] of images x0 f[n,H,W,C], each value one of `levels` grey levels -1, ..., 1.

        keys key[n] draw what is random, one an image: the estimate is unbiased (of the bound, where it is one) and
        depends on the image and its key alone.
        """
        ...


# ------------------------------------------------------------------------------------------ the flow


@dataclass(frozen=True, kw_only=True)
class Flow:
    """-log p by the probability-flow ODE, of the image made continuous.

    Attributes:
      steps: of the Runge-Kutta method, each of 4 evaluations of the denoiser.
      probes: random vectors behind each trace; they cost a derivative each and lower the estimate's variance.
    """

    steps: int = 32
    probes: int = 1

    def __post_init__(self) -> None:
        if self.steps < 1 or self.probes < 1:
            raise ValueError(f"steps and probes must be at least 1, not {self.steps} and {self.probes}")

    def __call__(self, denoise: Denoiser, schedule: Schedule, x0: Array, keys: Array, levels: int) -> Array:
        """See `Likelihood`."""
        x = grey.dequantise(x0, rng.fold(keys, 0), levels)
        probes = rademacher(rng.fold(keys, 1), self.probes, x)
        dimensions = math.prod(x0.shape[1:])
        # P(level) is the density's mean over the level's width.
        nats = -flow_log_density(denoise, schedule, x, probes, jnp.int32(self.steps))
        return grey.bits_per_dimension(nats - dimensions * math.log(grey.step(levels)), dimensions)


def rademacher(keys: Array, probes: int, x: Array) -> Array:
    """Vectors v of random signs, f[probes,n,H,W,C] like x: E v v^T = I, and v^T J v is exact for a diagonal J."""
    signs = rng.draw(keys, lambda key: jax.random.rademacher(key, (probes, *x.shape[1:]), x.dtype))
    return jnp.swapaxes(signs, 0, 1)


def basis(x: Array) -> Array:
    """The d unit vectors times sqrt(d), f[d,n,H,W,C] like x: probes with which the trace is exact, at d derivatives."""
    d = math.prod(x.shape[1:])
    unit = jnp.eye(d, dtype=x.dtype).reshape(d, 1, *x.shape[1:])
    return math.sqrt(d) * jnp.broadcast_to(unit, (d, *x.shape))


def flow_log_density(denoise: Denoiser, schedule: Schedule, x0: Array, probes: Array, steps: Array) -> Array:
    """log p(x0) f[n] in nats, of continuous x0 f[n,H,W,C], by `steps` i32[] steps of the flow.

    In the straight frame z = x / c, with f = dz / dtau = eps - k x0,

        log p(x0) = log N(z_1; 0, sigma(1)^2) + integral of tr(df/dz) dtau + d log(alpha / c).

    The integral runs from first_time to 1, and the last term, of the change from x0 to z = alpha x0 / c, is taken at
    first_time; at the other end c = 1. tr(J) is the mean of v^T J v over probes v with E v v^T = I, the same ones all
    along the path (Grathwohl et al. 2019, section 3.1). p is the density of what the flow makes of N(0, sigma(1)^2):
    alpha(1) x0, what is left of the data there, is neglected as it is in sampling.

    Args:
      denoise: (x, t f[]) -> `Denoised`.
      schedule: alpha and sigma.
      x0: the images.
      probes: f[P,n,H,W,C], from `rademacher` or `basis`.
      steps: of the classical Runge-Kutta method, of order 4, equal in tau^(1/7) (Karras et al. 2022, eq. 5).
    """
    frame, rho = Straight(schedule), 7.0
    first = first_time(schedule).astype(x0.dtype)
    begin, end = frame.time(first), frame.time(jnp.ones_like(first))

    def stop(i: Array) -> Array:
        u = i.astype(x0.dtype) / steps.astype(x0.dtype)
        return (begin ** (1.0 / rho) * (1.0 - u) + end ** (1.0 / rho) * u) ** rho

    def field(tau: Array, z: Array) -> tuple[Array, Array]:
        t = jnp.where(tau < end, _time_at(frame, tau), 1.0)
        slope = lambda z: frame.slope(denoise(over(frame.scale(t), z) * z, t))
        return _value_and_trace(slope, z, probes)

    def step(i: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        tau, h = stop(i), stop(i + 1) - stop(i)
        ahead = lambda share, by: jax.tree.map(lambda y, d: y + share * h * d, state, by)
        k1 = field(tau, state[0])
        k2 = field(tau + 0.5 * h, ahead(0.5, k1)[0])
        k3 = field(tau + 0.5 * h, ahead(0.5, k2)[0])
        k4 = field(tau + h, ahead(1.0, k3)[0])
        return ahead(1.0 / 6.0, jax.tree.map(lambda a, b, c, d: a + 2.0 * (b + c) + d, k1, k2, k3, k4))

    ratio = schedule.alpha(first) / frame.scale(first)
    z, trace = jax.lax.fori_loop(0, steps, step, (over(ratio, x0) * x0, jnp.zeros_like(x0[:, 0, 0, 0])))
    noise = jnp.sum(jax.scipy.stats.norm.logpdf(z / over(end, z)), axis=(1, 2, 3))
    return noise + trace + math.prod(x0.shape[1:]) * (jnp.log(ratio) - jnp.log(end))


def _time_at(frame: Straight, tau: Array) -> Array:
    """t from tau = sigma / (alpha + k sigma), below 1: sigma / alpha = tau / (1 - k tau)."""
    return frame.schedule.time(2.0 * (jnp.log1p(-frame.k.astype(tau.dtype) * tau) - jnp.log(tau)))


def _value_and_trace(f: Callable[[Array], Array], z: Array, probes: Array) -> tuple[Array, Array]:
    """f(z) f[n,H,W,C] and the mean over the probes of v^T (df/dz) v, f[n].

    By backward derivatives, which every kernel of attention has; f is evaluated once for all probes.
    """
    value, pull = jax.vjp(f, z)
    traces = jax.vmap(lambda v: jnp.sum(v * pull(v)[0], axis=(1, 2, 3)))(probes)
    return value, jnp.mean(traces, axis=0)


# ------------------------------------------------------------------------------------------ the variational bound

LAST_LOGSNR = -20.0
"""The bound's process ends here, or at t = 1 if that is earlier: there is e^-20 of the signal's variance left."""


@dataclass(frozen=True, kw_only=True)
class Bound:
    """The variational bound on -log P(x0) in continuous time (Kingma et al. 2021, eq. 11 and section 5).

        KL(q(x_1 | x0) || N(0, sigma_1^2)) + E[-log p(x0 | x_first)] + 1/2 integral of E |eps - eps_hat|^2 dlogsnr

    The integral, over log SNR from its last value to its first, is a mean over draws that lie evenly in it.

    Attributes:
      draws: evaluations of the denoiser an image; the estimate's variance falls with them.
    """

    draws: int = 32

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise ValueError(f"draws must be at least 1, not {self.draws}")

    def __call__(self, denoise: Denoiser, schedule: Schedule, x0: Array, keys: Array, levels: int) -> Array:
        """See `Likelihood`."""
        noise = rng.normal(rng.fold(keys, 0), x0.shape[1:], x0.dtype)
        nats = prior_loss(schedule, x0) + reconstruction_loss(schedule, x0, noise, levels)
        nats += diffusion_loss(denoise, schedule, x0, rng.fold(keys, 1), jnp.int32(self.draws), levels)
        return grey.bits_per_dimension(nats, math.prod(x0.shape[1:]))


def prior_loss(schedule: Schedule, x0: Array) -> Array:
    """KL(N(alpha x0, sigma^2) || N(0, sigma^2)) = |alpha x0|^2 / (2 sigma^2) at the last log SNR, f[n] in nats."""
    last = _last(schedule, x0.dtype)
    return 0.5 * jnp.exp(last) * jnp.sum(jnp.square(x0), axis=(1, 2, 3))


def reconstruction_loss(schedule: Schedule, x0: Array, noise: Array, levels: int) -> Array:
    """-log p(x0 | x) f[n] in nats, for x at the process's beginning made with `noise` f[n,H,W,C].

    Each value on its own, by Bayes' rule with all levels alike: p(level | x) ~ N(x; alpha level, sigma^2) (Kingma et
    al. 2021, section 3.3). The sum over levels is taken one after the other: there may be 256 of them.
    """
    ratio = jnp.exp(-0.5 * _first(schedule, x0.dtype, levels))  # sigma / alpha

    def add(k: Array, total: Array) -> Array:
        level = -1.0 + k.astype(x0.dtype) * (2.0 / (levels - 1))
        return jnp.logaddexp(total, -0.5 * jnp.square((x0 - level) / ratio + noise))

    total = jax.lax.fori_loop(0, levels, add, jnp.full_like(x0, -jnp.inf))
    return jnp.sum(total + 0.5 * jnp.square(noise), axis=(1, 2, 3))


def diffusion_loss(denoise: Denoiser, schedule: Schedule, x0: Array, keys: Array, draws: Array, levels: int) -> Array:
    """1/2 integral of E |eps - eps_hat(x_t, t)|^2 dlogsnr, f[n] in nats, by `draws` i32[] evaluations.

    The log SNRs are (u + j) / draws of the way, j = 0, 1, ...: uniform together, and evenly spread in each image.
    """
    first, last = _first(schedule, x0.dtype, levels), _last(schedule, x0.dtype)
    u = rng.uniform(rng.fold(keys, 0), x0.dtype)

    def add(j: Array, total: Array) -> Array:
        t = schedule.time(first + (last - first) * (u + j.astype(u.dtype)) / draws.astype(u.dtype))
        eps = rng.normal(rng.fold(keys, j + 1), x0.shape[1:], x0.dtype)
        x = over(schedule.alpha(t), x0) * x0 + over(schedule.sigma(t), x0) * eps
        return total + jnp.sum(jnp.square(eps - denoise(x, t).eps), axis=(1, 2, 3))

    total = jax.lax.fori_loop(0, draws, add, jnp.zeros_like(u))
    return 0.5 * (first - last) * total / draws.astype(u.dtype)


def _first(schedule: Schedule, dtype: jnp.dtype, levels: int) -> Array:
    """The log SNR f[] at which the bound's process begins: sigma / alpha is an eighth of the distance between levels.

    The level can still be read off there (it is missed 6 times in 100,000), and any noise below that would ask the
    model for what no image needs. For 256 levels this is `first_time`, which it never falls below.
    """
    readable = -2.0 * math.log(2.0 / (levels - 1) / 8.0)
    return jnp.minimum(logsnr(schedule, first_time(schedule).astype(dtype)), readable)


def _last(schedule: Schedule, dtype: jnp.dtype) -> Array:
    """The log SNR f[] at which it ends."""
    return jnp.maximum(logsnr(schedule, jnp.ones((), dtype)), LAST_LOGSNR)


LIKELIHOODS = {"flow": Flow, "bound": Bound}
