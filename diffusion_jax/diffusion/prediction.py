"""What the network predicts, as two coefficients: y = a x0 + b eps.

Together with x = alpha x0 + sigma eps these are two linear equations. With D = alpha b - sigma a,

    x0  = (b x - sigma y) / D,        eps = (alpha y - a x) / D,

so there is no table of converters: a new prediction is one more pair (a, b). Where D vanishes the pair (x, y) does not
determine (x0, eps), and `check_pairing` refuses it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from diffusion_jax.diffusion.broadcast import over
from diffusion_jax.diffusion.schedule import Schedule, first_time, with_derivatives
from diffusion_jax.errors import require
from diffusion_jax.types import Array


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A prediction bound to a schedule.

    Attributes:
      schedule: the schedule it is bound to.
      coefficients: t -> (a, b).
      input_scale: t -> c_in, by which the network's input is multiplied.
    """

    schedule: Schedule
    coefficients: Callable[[Array], tuple[Array, Array]]
    input_scale: Callable[[Array], Array]

    def determinant(self, t: Array) -> Array:
        """D = alpha b - sigma a."""
        a, b = self.coefficients(t)
        return self.schedule.alpha(t) * b - self.schedule.sigma(t) * a

    def target(self, x0: Array, eps: Array, t: Array) -> Array:
        """y = a x0 + b eps, for t f32[] or f32[B]."""
        a, b = self.coefficients(t)
        return over(a, x0) * x0 + over(b, x0) * eps

    def split(self, x: Array, y: Array, t: Array) -> tuple[Array, Array]:
        """(x0, eps) from x and the network's y, for t f32[] or f32[B] above 0."""
        a, b = self.coefficients(t)
        alpha, sigma, d = self.schedule.alpha(t), self.schedule.sigma(t), self.determinant(t)
        x0 = over(b / d, x) * x - over(sigma / d, x) * y
        eps = over(alpha / d, x) * y - over(a / d, x) * x
        return x0, eps


def _within_unit_variance(schedule: Schedule) -> Callable[[Array], Array]:
    """c_in = 1 / max(1, sqrt(alpha^2 + sigma^2)).

    1 for variance-preserving schedules and for rectified flow, whose networks see x itself (Ho et al. 2020; Ma et al.
    2024); 1 / sqrt(1 + sigma^2) where the variance explodes.
    """

    def scale(t: Array) -> Array:
        return jax.lax.rsqrt(jnp.maximum(1.0, schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2))

    return scale


def eps(*, schedule: Schedule) -> Prediction:
    """y = eps (Ho et al. 2020, eq. 14)."""
    return Prediction(
        schedule=schedule,
        coefficients=lambda t: (jnp.zeros_like(t), jnp.ones_like(t)),
        input_scale=_within_unit_variance(schedule),
    )


def score(*, schedule: Schedule) -> Prediction:
    """y = grad log q(x_t | x0) = -eps / sigma (Song et al. 2021, eq. 7); give its error the weighting `snr`.

    Plainly squared it grows like 1 / sigma^2 towards the data; with `snr` it is the error of eps.
    """
    return Prediction(
        schedule=schedule,
        coefficients=lambda t: (jnp.zeros_like(t), -1.0 / schedule.sigma(t)),
        input_scale=_within_unit_variance(schedule),
    )


def x0(*, schedule: Schedule) -> Prediction:
    """y = x0 (Salimans & Ho 2022, section 4)."""
    return Prediction(
        schedule=schedule,
        coefficients=lambda t: (jnp.ones_like(t), jnp.zeros_like(t)),
        input_scale=_within_unit_variance(schedule),
    )


def v(*, schedule: Schedule) -> Prediction:
    """y = alpha eps - sigma x0 (Salimans & Ho 2022, appendix D)."""
    return Prediction(
        schedule=schedule,
        coefficients=lambda t: (-schedule.sigma(t), schedule.alpha(t)),
        input_scale=_within_unit_variance(schedule),
    )


def velocity(*, schedule: Schedule) -> Prediction:
    """y = dx/dt = alpha' x0 + sigma' eps (Lipman et al. 2022, section 4); eps - x0 for rectified flow."""
    return Prediction(
        schedule=schedule,
        coefficients=lambda t: with_derivatives(schedule, t)[2:],
        input_scale=_within_unit_variance(schedule),
    )


def edm(*, schedule: Schedule, sigma_data: float = 0.5) -> Prediction:
    """EDM's preconditioning (Karras et al. 2022, Table 1), written for any alpha.

    With S = sqrt(sigma^2 + alpha^2 sigma_data^2): a = sigma / (sigma_data S), b = -alpha sigma_data / S, c_in = 1 / S.
    At alpha = 1 this is y = (x0 - c_skip x) / c_out; D = -S / sigma_data never vanishes.
    """
    if not sigma_data > 0.0:
        raise ValueError(f"sigma_data must be positive, not {sigma_data}")

    def total(t: Array) -> Array:
        return jnp.hypot(schedule.sigma(t), sigma_data * schedule.alpha(t))

    def coefficients(t: Array) -> tuple[Array, Array]:
        return schedule.sigma(t) / (sigma_data * total(t)), -sigma_data * schedule.alpha(t) / total(t)

    return Prediction(schedule=schedule, coefficients=coefficients, input_scale=lambda t: 1.0 / total(t))


PREDICTIONS = {"eps": eps, "score": score, "x0": x0, "v": v, "velocity": velocity, "edm": edm}


def check_pairing(field: str, prediction: Prediction, names: str) -> None:
    """Raise `UserError` where D vanishes, or is not finite, inside the times that training and sampling use.

    Sampling starts at t = 1 and never asks for t = 0; training stays within [first_time, 1].
    """
    t = jnp.linspace(first_time(prediction.schedule), 1.0, 1001)
    d = jnp.abs(prediction.determinant(t))
    usable = jnp.isfinite(d) & (d > 1e-6)
    where = float(t[jnp.argmin(usable)])
    rule = f"at t = {where:.3g} the noisy image and this prediction do not determine the image; take another of the two"
    require(bool(jnp.all(usable)), field, names, rule)
