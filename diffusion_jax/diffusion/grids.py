"""Time grids: at which times a solver stops, from 1 down to 0.

A grid is f32[MAX_STEPS + 1]; its first `steps` + 1 entries fall from the noise to exactly 0 and the rest stay there.
Its length does not depend on the number of steps, so that number is traced and changing it does not compile again.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp

from diffusion_jax.diffusion.schedule import Schedule, logsnr
from diffusion_jax.diffusion.schedule.discrete import MOST_STEPS
from diffusion_jax.diffusion.schedule.wrappers import check_shift, shift_time
from diffusion_jax.types import Array

MAX_STEPS = 1000


@dataclass(frozen=True)
class Grid:
    """(schedule, steps i32[]) -> f32[MAX_STEPS + 1], falling to 0 at entry `steps`.

    Attributes:
      times: (schedule, i f32[MAX_STEPS + 1] = 0, 1, 2 ..., steps f32[]) -> the time of stop i; what it says from i =
        steps on is not looked at.
      steps: the only number of steps that the grid is meant for, None for any.
      most: the largest number of steps that it is meant for.
      of_noise: it asks for the schedule's log-SNR.
    """

    times: Callable[[Schedule, Array, Array], Array]
    steps: int | None = None
    most: int = MAX_STEPS
    of_noise: bool = False

    def __call__(self, schedule: Schedule, steps: Array) -> Array:  # noqa: D102
        i, steps = jnp.arange(MAX_STEPS + 1, dtype=jnp.float32), jnp.asarray(steps, jnp.float32)
        return jnp.where(i < steps, self.times(schedule, i, steps), 0.0)


# ---------------------------------------------------------------------------------------------- steps of t


def uniform() -> Grid:
    """t_i = 1 - i / steps."""
    return Grid(lambda schedule, i, steps: 1.0 - i / steps)


def quadratic() -> Grid:
    """t_i = (1 - i / steps)^2: small steps at the end, where details are decided (Song, Meng & Ermon 2021, D.2)."""
    return Grid(lambda schedule, i, steps: (1.0 - i / steps) ** 2)


def cosine() -> Grid:
    """t_i = (1 + cos(pi i / steps)) / 2: small steps at both ends (the Chebyshev-Lobatto points of [0, 1])."""
    return Grid(lambda schedule, i, steps: jnp.sin(0.5 * jnp.pi * (steps - i) / steps) ** 2)


def shifted(shift: float = 3.0) -> Grid:
    """t_i = s u / (1 + (s - 1) u), u = 1 - i / steps: more steps in the noise (Esser et al. 2024, eq. 23)."""
    check_shift(shift)
    return Grid(lambda schedule, i, steps: shift_time(1.0 - i / steps, shift))


def discrete(spacing: str = "trailing", of: int = MAX_STEPS) -> Grid:
    """Some of the steps k = 0 .. T - 1, T = `of`, of a discrete process; step k is the time (k + 1) / T.

    The three spacings of Lin et al. 2023, Table 2; `leading` does not start in pure noise:

        leading:   k_i = (n - 1 - i) floor(T / n)
        trailing:  k_i = round((n - i) T / n) - 1
        linspace:  k_i = round((n - 1 - i) (T - 1) / (n - 1)), and k_0 = 0 for a single step

    in whole numbers, an exact half rounded to the even neighbour. (Programs that round NumPy's float64 mean the same,
    and take the odd one where the quotient came out an ulp beside the half: linspace at n = 27 has 499 for 500.)

    A process of T steps has no more than T to stop at: for a larger n, which a user should be refused (`Grid.most`),
    it is `uniform`.
    """
    steps_of = {
        "leading": lambda i, n: (n - 1 - i) * (of // n),
        "trailing": lambda i, n: _rounded(of * (n - i), n) - 1,
        "linspace": lambda i, n: _rounded((n - 1 - i) * (of - 1), jnp.maximum(n - 1, 1)),
    }
    if spacing not in steps_of:
        raise ValueError(f"spacing must be one of {', '.join(steps_of)}, not {spacing!r}")
    if not 1 <= of <= MOST_STEPS:  # times MAX_STEPS it is an int32
        raise ValueError(f"of must lie in [1, {MOST_STEPS}], not be {of}")

    def times(schedule: Schedule, i: Array, n: Array) -> Array:
        k = steps_of[spacing](i.astype(jnp.int32), n.astype(jnp.int32))
        return jnp.where(n <= of, (k + 1).astype(i.dtype) / of, 1.0 - i / n)

    return Grid(times, most=min(of, MAX_STEPS))


def _rounded(a: Array, b: Array) -> Array:
    """round(a / b) of whole numbers, b > 0; a half goes to the even neighbour."""
    down, rest = a // b, a % b
    up = (2 * rest > b) | ((2 * rest == b) & (down % 2 == 1))
    return down + up.astype(down.dtype)


def custom(times: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)) -> Grid:
    """The stops written down, then 0: t_i = times[i], and as many steps as times.

    For another number of steps, which a user should be refused (`Grid.steps`), it is the line through these stops.
    """
    falling = all(later < earlier for earlier, later in itertools.pairwise(times))
    if not (0 < len(times) <= MAX_STEPS and falling and times[-1] > 0.0 and times[0] <= 1.0):
        raise ValueError(f"times must be 1 to {MAX_STEPS} numbers that fall, from 1 at most to above 0, not {times}")
    stops = jnp.asarray([*times, 0.0], jnp.float32)
    places = jnp.arange(len(stops), dtype=jnp.float32)
    return Grid(lambda schedule, i, steps: jnp.interp(i * (len(times) / steps), places, stops), steps=len(times))


# ---------------------------------------------------------------------------------------------- steps of noise


def karras(rho: float = 7.0, sigma_min: float = 0.002, sigma_max: float = 80.0) -> Grid:
    """Equal steps in (sigma/alpha)^(1/rho) from sigma_max to sigma_min, then 0 (Karras et al. 2022, eq. 5).

        log sigma_i = log sigma_max + rho log(1 + r_i (q - 1)),    q = (sigma_min / sigma_max)^(1/rho),

    with r_i = 0 ... 1. So written, nothing overflows where rho is small; a large one gives equal steps of log sigma.
    It starts at the schedule's own sigma(1) / alpha(1) where that is less.
    """
    if not 0.0 < rho <= 1e6:
        raise ValueError(f"rho must lie in (0, 1e6], not be {rho}; from there on take logsnr_uniform")
    if not 1e-6 <= sigma_min < sigma_max <= 1e4:  # beyond, float32 does not tell times from 0, or from 1
        raise ValueError(f"1e-6 <= sigma_min < sigma_max <= 1e4 must hold, not {sigma_min} and {sigma_max}")

    def times(schedule: Schedule, i: Array, steps: Array) -> Array:
        first, last = jnp.minimum(math.log(sigma_max), -0.5 * _end(schedule)), math.log(sigma_min)
        ramp, q_less_1 = _ramp(i, steps), jnp.expm1((last - first) / rho)
        log_sigma = first + rho * jnp.log1p(ramp * q_less_1)
        return _at(schedule, -2.0 * jnp.where(ramp < 1.0, log_sigma, last))

    return Grid(times, of_noise=True)


def logsnr_uniform(logsnr_min: float = -2.0 * math.log(80.0), logsnr_max: float = 2.0 * math.log(500.0)) -> Grid:
    """Equal steps of log-SNR from logsnr_min to logsnr_max, then 0 (Lu et al. 2022, section 3.4).

    It starts at the schedule's own log-SNR at t = 1 where that is more. As it stands: `karras`'s ends.
    """
    if not -20.0 <= logsnr_min < logsnr_max <= 30.0:  # for the same reason as in `karras`
        raise ValueError(f"-20 <= logsnr_min < logsnr_max <= 30 must hold, not {logsnr_min} and {logsnr_max}")

    def times(schedule: Schedule, i: Array, steps: Array) -> Array:
        first = jnp.maximum(logsnr_min, _end(schedule))
        return _at(schedule, first + _ramp(i, steps) * (logsnr_max - first))

    return Grid(times, of_noise=True)


def _ramp(i: Array, steps: Array) -> Array:
    """0 at the first stop and 1 at the last one above 0."""
    return jnp.clip(i / jnp.maximum(steps - 1.0, 1.0), 0.0, 1.0)


def _end(schedule: Schedule) -> Array:
    """f32[]: the log-SNR at t = 1."""
    return logsnr(schedule, jnp.float32(1.0))


def _at(schedule: Schedule, logsnr: Array) -> Array:
    return jnp.clip(schedule.time(logsnr), 0.0, 1.0)


GRIDS = {
    "uniform": uniform,
    "quadratic": quadratic,
    "cosine": cosine,
    "shifted": shifted,
    "discrete": discrete,
    "custom": custom,
    "karras": karras,
    "logsnr_uniform": logsnr_uniform,
}
