"""The frame in which a schedule's lines are straight, and the probability-flow ODE as simple as it gets.

Divide x = alpha x0 + sigma eps by c = alpha + k sigma and tell the time by tau = sigma / c, with k = (1 - alpha(1)) /
sigma(1). Then

    x / c = (1 - k tau) x0 + tau eps,        d(x / c) / d tau = eps - k x0,

so while x0 and eps stand still, x / c moves on a straight line, whatever the schedule's own curves are: a method that
steps along lines reaches a single point exactly. Where the schedule is straight already the frame changes nothing:
for alpha = 1, k is 0 and tau is sigma (Karras et al. 2022, section 4); for rectified flow, k is 1 and tau is t. For
variance-preserving schedules it is regular at both ends, alpha = 0 and sigma = 0, as sigma / alpha is not.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from diffusion_jax.diffusion.broadcast import over
from diffusion_jax.diffusion.schedule import Schedule
from diffusion_jax.types import Array, Denoised


@dataclass(frozen=True)
class Straight:
    """The straight frame of a schedule. `scale` and `time` are elementwise in t."""

    schedule: Schedule

    @property
    def k(self) -> Array:
        """f32[]: weight of sigma in c, so that c is 1 at both ends."""
        with jax.ensure_compile_time_eval():
            one = jnp.asarray(1.0, jnp.result_type(float))
        return (1.0 - self.schedule.alpha(one)) / self.schedule.sigma(one)

    def scale(self, t: Array) -> Array:
        """c = alpha + k sigma."""
        return self.schedule.alpha(t) + self.k.astype(t.dtype) * self.schedule.sigma(t)

    def time(self, t: Array) -> Array:
        """tau = sigma / c: 0 at t = 0, rising."""
        return self.schedule.sigma(t) / self.scale(t)

    def slope(self, d: Denoised) -> Array:
        """d(x / c) / d tau = eps - k x0, for what the denoiser made of x."""
        return d.eps - over(self.k, d.x0) * d.x0

    def move(self, x: Array, t: Array, s: Array, slope: Array) -> Array:
        """x at time s, for x at time t and one slope between."""
        moved = x / over(self.scale(t), x) + over(self.time(s) - self.time(t), x) * slope
        return over(self.scale(s), x) * moved
