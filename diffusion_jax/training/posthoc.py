"""Averages of the weights chosen after training, from the power-function averages in its checkpoints.

An average of width std that ends at step T weighs the parameters theta(tau) by the density

    p(tau) = (gamma + 1) tau^gamma / T^(gamma + 1)        for 0 < tau <= T, else 0

(Karras et al. 2024, eq. 2). Stored averages with densities p_i, each of its own step and width, add up to the one that
is wanted, p, as well as sum_i x_i p_i comes near p. Least squares over tau give the weights (appendix C, algorithm 3):

    A x = b,        A_ij = integral of p_i p_j,        b_i = integral of p_i p.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.errors import UserError, require
from diffusion_jax.training.ema import Power, Rule, power_gamma
from diffusion_jax.types import Array, Weights

MAX_ERROR = 0.05
"""Relative error of the combined density, in the integral of its square, beyond which an average is refused.

The weights then sum to 1 within 0.01; Karras et al. state no limit.
"""


class Snapshot(NamedTuple):
    """A stored average: what the averaging profile `profile`, a power function of width `std`, was at `step`."""

    step: int
    profile: str
    std: float


def snapshots(steps: Iterable[int], rules: Mapping[str, Rule], end: int) -> list[Snapshot]:
    """What the checkpoints at `steps` hold of power-function averages, up to step `end`.

    Args:
      steps: of the checkpoints: numbers of finished updates.
      rules: the run's averaging profiles, by name.
      end: the last step that counts.

    Raises:
      UserError: where no profile is a power function.
    """
    widths = {name: rule.std for name, rule in rules.items() if isinstance(rule, Power)}
    rule = "an average can be chosen afterwards only where train.ema has profiles such as 'power(std=0.05)'"
    require(bool(widths), "train.ema", ", ".join(rules), rule)
    return [Snapshot(step, name, std) for step in steps if 0 < step <= end for name, std in widths.items()]


def solve(stored: Sequence[Snapshot], std: float, end: int) -> tuple[np.ndarray, float]:
    """Weights f64[N] of the stored averages for the one of width `std` that ends at step `end`, and their error.

    The error is the distance of the combined density from the wanted one, relative to the latter's norm.
    """
    step = np.array([s.step for s in stored], np.float64)
    gamma = np.array([power_gamma(s.std) for s in stored])
    wanted = float(end), power_gamma(std)
    # Densities of norm 1: the system is then as well conditioned as it gets by scaling, and equal ones share a weight.
    norm = np.sqrt(inner_product(step, gamma, step, gamma))
    a = inner_product(step[:, None], gamma[:, None], step, gamma) / (norm[:, None] * norm)
    b = inner_product(step, gamma, *wanted) / norm
    x = np.linalg.lstsq(a, b, rcond=None)[0]
    square = inner_product(*wanted, *wanted)
    return x / norm, float(np.sqrt(max(0.0, 1.0 - b @ x / square)))


def inner_product(step_a: np.ndarray, gamma_a: np.ndarray, step_b: np.ndarray, gamma_b: np.ndarray) -> np.ndarray:
    """The integral of p_a p_b over tau, elementwise: up to t = min(T_a, T_b) both are powers.

    (gamma_a + 1) (gamma_b + 1) / (gamma_a + gamma_b + 1) (t / T_a)^gamma_a (t / T_b)^gamma_b t / (T_a T_b)
    """
    t = np.minimum(step_a, step_b)
    powers = (t / step_a) ** gamma_a * (t / step_b) ** gamma_b * t / (step_a * step_b)
    return (gamma_a + 1.0) * (gamma_b + 1.0) / (gamma_a + gamma_b + 1.0) * powers


def combine(stored: Sequence[Snapshot], std: float, end: int, load: Callable[[int, str], Weights]) -> Weights:
    """The average of width `std` that ends at step `end`.

    Args:
      stored: as `snapshots` lists them.
      std: the width, in (0, 1/sqrt(12)].
      end: the step at which the average ends.
      load: (step, profile) -> the weights stored there; called once for each, and only the sum is kept.

    Raises:
      UserError: where the stored averages do not come near the wanted one.
    """
    weights, error = solve(stored, std, end) if stored else (np.zeros(0), 1.0)
    if not error <= MAX_ERROR:
        raise UserError(
            f"posthoc(std={std}) at step {end}: the {len(stored)} stored averages come within {error:.0%} of it, not "
            f"{MAX_ERROR:.0%}; take a std nearer to theirs, or train with a smaller checkpoint.keep_every."
        )
    total = None
    for weight, snapshot in zip(weights, stored, strict=True):
        part = load(snapshot.step, snapshot.profile)
        total = _add(jax.tree.map(jnp.zeros_like, part) if total is None else total, jnp.float32(weight), part)
    return total


def _plus(total: Weights, weight: Array, part: Weights) -> Weights:
    return jax.tree.map(lambda old, new: old + weight.astype(new.dtype) * new, total, part)


_add = jax.jit(_plus, donate_argnums=0)  # the sum is updated in its place: two trees in memory, not three
