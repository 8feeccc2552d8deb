"""The probability-flow ODE by Dormand & Prince's adaptive Runge-Kutta method, in the straight frame."""

from dataclasses import dataclass

import jax.numpy as jnp

from diffusion_jax.diffusion.broadcast import over
from diffusion_jax.diffusion.schedule import Schedule, first_time
from diffusion_jax.diffusion.solvers import dormand_prince
from diffusion_jax.diffusion.solvers.base import pytree
from diffusion_jax.diffusion.straight import Straight
from diffusion_jax.types import Array, Denoiser


@pytree
@dataclass(frozen=True, kw_only=True)
class RK45:
    """Divides a step of the grid into parts, each with an error below atol + rtol |x / c|, as a root mean square.

    The parts are of order 5 and six evaluations each, with one more a step. The last step, to s = 0, is adaptive down
    to `first_time` and straight from there. Song et al. 2021 (section 4.3) sample so, with both tolerances at 1e-5.
    """

    rtol: float = 1e-3
    atol: float = 1e-3

    def __post_init__(self) -> None:
        for name, value in (("rtol", self.rtol), ("atol", self.atol)):
            if isinstance(value, float) and not value > 0.0:
                raise ValueError(f"{name} must be positive, not {value}")

    def init(self, x: Array) -> tuple:  # noqa: D102
        return ()

    def step(  # noqa: D102
        self, denoise: Denoiser, schedule: Schedule, x: Array, t: Array, s: Array, carry: tuple, keys: Array
    ) -> tuple[Array, tuple]:
        frame = Straight(schedule)
        end = jnp.where(s > 0.0, s, jnp.minimum(first_time(schedule).astype(t.dtype), 0.5 * t))
        way = frame.time(end) - frame.time(t)

        def slope(done: Array, y: Array) -> Array:
            """d(x / c) / d tau where each image has `done` f[n] of the way behind it."""
            tau = frame.time(t) + done.astype(t.dtype) * way
            alpha_over_sigma = 1.0 / tau - frame.k.astype(t.dtype)  # tau = sigma / (alpha + k sigma)
            time = schedule.time(2.0 * jnp.log(alpha_over_sigma))
            time = jnp.clip(time, jnp.minimum(t, end), jnp.maximum(t, end))
            return frame.slope(denoise(over(frame.scale(time), y) * y, time))

        y, last = dormand_prince.integrate(slope, way, x / over(frame.scale(t), x), self.rtol, self.atol)
        return frame.move(over(frame.scale(end), y) * y, end, s, last), carry
