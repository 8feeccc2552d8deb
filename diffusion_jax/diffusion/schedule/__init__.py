"""Noise schedules: x_t = alpha(t) x0 + sigma(t) eps, t in [0, 1], data at 0, noise at 1.

A schedule states alpha, sigma, the time at which a given log signal-to-noise ratio is reached, and the label under
which a network is told the time. Derivatives come from `jax.jvp`; there is nothing else to a schedule.

`SCHEDULES` has the rows. `Learned` is no row: it has parameters, and is a schedule once they are bound.
"""

import math

import jax
import jax.numpy as jnp

from diffusion_jax import plugs
from diffusion_jax.diffusion.schedule.base import Schedule, first_time, logsnr, with_derivatives
from diffusion_jax.diffusion.schedule.continuous import EDM, VE, Cosine, RectifiedFlow, Sigmoid, VPLinear, gvp
from diffusion_jax.diffusion.schedule.discrete import (
    CosineDiscrete,
    DDPMLinear,
    Discrete,
    ScaledLinear,
    ZeroTerminalSNR,
)
from diffusion_jax.diffusion.schedule.learned import Learned
from diffusion_jax.diffusion.schedule.wrappers import ResolutionShifted, Shifted, ZeroTerminalLimit

__all__ = ["SCHEDULES", "Learned", "Schedule", "first_time", "logsnr", "with_derivatives"]


def shifted(of: str = "cosine", logsnr: float = 2.0 * math.log(64 / 256)) -> Shifted:
    """`of`, another row, with its log-SNR shifted; as it stands for images of 256 pixels a side."""
    return Shifted(of=_row(of), logsnr=logsnr)


def resolution_shifted(of: str = "rectified_flow", shift: float = 3.0) -> ResolutionShifted:
    """`of`, another row, with its time shifted; 3 is what Esser et al. 2024 use at 1024 pixels a side."""
    return ResolutionShifted(of=_row(of), shift=shift)


def zero_terminal_snr(of: str = "scaled_linear") -> Schedule:
    """`of`, another row that preserves variance, stretched to end without signal."""
    row = _row(of)
    if isinstance(row, Discrete):
        return ZeroTerminalSNR(of=row)
    if not _turns_data_to_noise(row):
        fitting = ", ".join(name for name, make in SCHEDULES.items() if _turns_data_to_noise(make()))
        rule = f"alpha must fall from 1 to near 0 with alpha^2 + sigma^2 = 1, as it does in {fitting}"
        raise ValueError(f"of = {of!r}: {rule}")
    return ZeroTerminalLimit(of=row)


def _turns_data_to_noise(row: Schedule) -> bool:
    """Whether it preserves variance and, at the end, more noise than signal is left: there is an alpha to stretch."""
    with jax.ensure_compile_time_eval():
        alpha, sigma = (curve(jnp.float32([0.5, 1.0])) for curve in (row.alpha, row.sigma))
        return bool(jnp.all(jnp.abs(alpha**2 + sigma**2 - 1.0) < 1e-5) & (alpha[1] < 0.5))


def _row(of: str) -> Schedule:
    """The row that a wrapper is made from.

    Not a learned schedule: it finds its times itself, which undoes any shift of them, and its ends are its own options.
    """
    field = "family.schedule: option 'of'"
    if plugs.parse(field, of)[0] == "learned":
        instead = "move its ends instead, learned(logsnr_max=..., logsnr_min=...)"
        raise ValueError(f"of = {of!r}: a learned schedule is not wrapped; {instead}")
    return plugs.build(field, of, SCHEDULES)


SCHEDULES = {
    # variance preserving
    "vp_linear": VPLinear,
    "ddpm_linear": DDPMLinear,
    "scaled_linear": ScaledLinear,
    "cosine": Cosine,
    "cosine_discrete": CosineDiscrete,
    "sigmoid": Sigmoid,
    "gvp": gvp,
    # variance exploding
    "ve": VE,
    "edm": EDM,
    # straight
    "rectified_flow": RectifiedFlow,
    # made from another row
    "shifted": shifted,
    "resolution_shifted": resolution_shifted,
    "zero_terminal_snr": zero_terminal_snr,
}
