"""Every schedule by its name: the rows of `SCHEDULES`, and `learned`, which is a schedule once it has parameters."""

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import plugs
from diffusion_jax.diffusion.schedule import SCHEDULES, Learned, Schedule

EVERY = (*SCHEDULES, "learned")
SORTS = ("vp_linear", "cosine", "edm", "rectified_flow", "zero_terminal_snr", "learned")
"""One of each sort: what most tests look at."""


def marks(prediction: str, schedule: str) -> list:
    """For a row of every prediction with every schedule: by default all on `SORTS`, and v on every schedule."""
    return [] if schedule in SORTS or prediction == "v" else [pytest.mark.slow]


def build(text: str) -> Schedule:
    """The schedule that `text` names; "learned" has bends of all kinds, and ends in less signal than most others."""
    return LEARNED if text == "learned" else plugs.build("schedule", text, SCHEDULES)


def _learned() -> Schedule:
    """Bends that are gentle and sharp, early and late: none of them is where `init` would put it."""
    slopes, places, sizes = np.float32([[1.0, 4.0, 9.0, 20.0], [3.0, -3.0, 2.0, -12.0], [2.0, 3.0, -1.0, 1.5]])
    params = {"a": jnp.asarray(slopes), "b": jnp.asarray(places), "c": jnp.asarray(sizes)}
    return Learned(hidden=4, logsnr_min=-9.0).bind(params)


LEARNED = _learned()
