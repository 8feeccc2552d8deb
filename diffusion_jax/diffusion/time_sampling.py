"""Which times training looks at: densities over t in [first_time, 1], as functions of a quantile u in [0, 1).

A density and how its quantiles are drawn are two things. `QUANTILES` has the ways to draw them: `independent`ly;
`stratified`, which spreads the times of a batch evenly over the density and so takes most of the noise of "which t was
it" out of the gradient; or by `importance`, more of them where the loss has been large.
"""

from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtri

from diffusion_jax import rng
from diffusion_jax.diffusion.schedule import Schedule, first_time
from diffusion_jax.types import Array, Tree


class TimeSampling(Protocol):
    """(schedule, u f32[B] in [0, 1)) -> t f32[B] in [first_time(schedule), 1]: the density's inverse distribution."""

    def __call__(self, schedule: Schedule, u: Array) -> Array: ...  # noqa: D102


def uniform() -> TimeSampling:
    """Uniform in t (Ho et al. 2020, algorithm 1)."""

    def time(schedule: Schedule, u: Array) -> Array:
        first = first_time(schedule).astype(u.dtype)
        return first + (1.0 - first) * u

    return time


def logit_normal(mean: float = 0.0, std: float = 1.0) -> TimeSampling:
    """logit(t) ~ N(mean, std^2): more of the middle (Esser et al. 2024, section 3.1)."""
    _positive(std)
    return lambda schedule, u: _within(schedule, jax.nn.sigmoid(mean + std * _normal(u)))


def log_normal(mean: float = -1.2, std: float = 1.2) -> TimeSampling:
    """ln(sigma / alpha) ~ N(mean, std^2): EDM's P_mean and P_std (Karras et al. 2022, Table 1)."""
    _positive(std)
    return lambda schedule, u: _within(schedule, schedule.time(-2.0 * (mean + std * _normal(u))))


TIME_SAMPLINGS = {"uniform": uniform, "logit_normal": logit_normal, "log_normal": log_normal}


def _normal(u: Array) -> Array:
    return ndtri(jnp.clip(u, 1e-7, 1.0 - 1e-7))


def _positive(std: float) -> None:
    if not std > 0.0:
        raise ValueError(f"std must be positive, not {std}")


def _within(schedule: Schedule, t: Array) -> Array:
    return jnp.clip(t, first_time(schedule).astype(t.dtype), 1.0)


# ---------------------------------------------------------------------------------------------- quantiles


class Quantiles(Protocol):
    """How quantiles are drawn. `history` is what a way remembers of past losses; it changes without gradient.

    A batch may come in parts, in any order, and is drawn as it would be in one: see `begun`.
    """

    def init(self) -> Tree:
        """The history before the first step; () where there is none."""
        ...

    def begun(self, history: Tree, step: Array) -> Tree:
        """The history as all of `step` i32[] draws from it. Only the first call in a step changes it."""
        ...

    def draw(self, history: Tree, key: Array, index: Array) -> tuple[Array, Array]:
        """Quantiles u f32[B] in [0, 1) and weights f32[B], whose mean is 1, to multiply the losses with.

        `history` has `begun`; `key` is the step's, `index` i32[B] the places in the batch. E weight f(u) is the
        integral of f over [0, 1].
        """
        ...

    def update(self, history: Tree, index: Array, u: Array, losses: Array) -> Tree:
        """The history after the losses f32[B] (without the weights of `draw`) at the quantiles u f32[B].

        What is drawn from stays as it is until the next step has begun.
        """
        ...


GOLDEN = 0.6180339887498949
"""(sqrt(5) - 1) / 2: of all steps around a circle, the one whose multiples lie most evenly, however many are taken."""


def independent(key: Array, index: Array) -> Array:
    """Quantiles f32[B], each of its own key: for a step's key and i32[B], the places in the batch."""
    return rng.uniform(rng.example_keys(key, index))


def stratified(key: Array, index: Array) -> Array:
    """Quantiles f32[B], each uniform, and together spread evenly: u_i = (u_0 + i golden) mod 1.

    The idea of Kingma et al. 2021 (appendix I.1, u_0 + i / B) with a step that does not depend on the batch's size, so
    that any part of a batch is spread evenly too.
    """
    return jnp.mod(jax.random.uniform(key) + jnp.mod(index.astype(jnp.float32) * GOLDEN, 1.0), 1.0)


class _WithoutHistory:
    """Quantiles that nothing which was seen changes."""

    def init(self) -> Tree:
        return ()

    def begun(self, history: Tree, step: Array) -> Tree:
        return history

    def update(self, history: Tree, index: Array, u: Array, losses: Array) -> Tree:
        return history


@dataclass(frozen=True, kw_only=True)
class Independent(_WithoutHistory):
    """Each quantile on its own."""

    def draw(self, history: Tree, key: Array, index: Array) -> tuple[Array, Array]:  # noqa: D102
        u = independent(key, index)
        return u, jnp.ones_like(u)


@dataclass(frozen=True, kw_only=True)
class Stratified(_WithoutHistory):
    """The quantiles of a batch spread evenly."""

    def draw(self, history: Tree, key: Array, index: Array) -> tuple[Array, Array]:  # noqa: D102
        u = stratified(key, index)
        return u, jnp.ones_like(u)


@dataclass(frozen=True, kw_only=True)
class Importance:
    """More quantiles where the loss varies more, and less weight there (Nichol & Dhariwal 2021, section 3.3, eq. 18).

        p_b proportional to sqrt(E L_b^2),    weight = 1 / p,

    over equal bins b of u, from the last `memory` losses in each; uniform until all bins have as many, and mixed with a
    share `uniform` of the uniform density. A bin is picked by stratified quantiles of p.
    """

    bins: int = 100
    memory: int = 10
    uniform: float = 0.001

    def __post_init__(self) -> None:
        if not (self.bins > 0 and self.memory > 0 and 0.0 < self.uniform <= 1.0):
            raise ValueError(
                "bins and memory must be positive and uniform lie in (0, 1], "
                f"not {self.bins}, {self.memory} and {self.uniform}"
            )

    def init(self) -> Tree:
        """The last losses of each bin, and what the present step draws from.

        `losses` f32[bins, memory], the last one first, and of which `step` and `index` (place in the batch) each is,
        i32[bins, memory], -1 where there is none yet; `density` f32[bins], as it was when the step `now` i32[] began.
        """
        none = jnp.full((self.bins, self.memory), -1, jnp.int32)
        losses = jnp.zeros((self.bins, self.memory))
        return {"losses": losses, "step": none, "index": none, "density": jnp.ones(self.bins), "now": jnp.int32(-1)}

    def begun(self, history: Tree, step: Array) -> Tree:
        """With the density of all losses before `step`."""
        density = jnp.where(history["now"] == step, history["density"], self.density(history))
        return history | {"density": density, "now": step}

    def density(self, history: Tree) -> Array:
        """p f32[bins], of mean 1: the density of u in each bin, after all losses so far."""
        size = jnp.sqrt(jnp.mean(jnp.square(history["losses"]), axis=1))
        known = jnp.all(history["step"] >= 0) & (jnp.sum(size) > 0.0)
        learned = size / jnp.where(known, jnp.mean(size), 1.0)
        return jnp.where(known, self.uniform + (1.0 - self.uniform) * learned, 1.0)

    def draw(self, history: Tree, key: Array, index: Array) -> tuple[Array, Array]:
        """The inverse distribution of the step's density at stratified quantiles."""
        p = history["density"]
        ends = jnp.concatenate([jnp.zeros(1), jnp.cumsum(p)]) / jnp.sum(p)
        quantile = stratified(key, index)
        bin = jnp.clip(jnp.searchsorted(ends, quantile, side="right") - 1, 0, self.bins - 1)
        within = (quantile - ends[bin]) / (ends[bin + 1] - ends[bin])
        u = (bin.astype(jnp.float32) + jnp.clip(within, 0.0, 1.0)) / self.bins
        return jnp.minimum(u, 1.0 - 2.0**-24), 1.0 / p[bin]  # below 1, whatever was rounded

    def update(self, history: Tree, index: Array, u: Array, losses: Array) -> Tree:
        """Of old losses and new ones each bin keeps the last, by step and place in the batch, not by arrival."""
        bin = jnp.clip((u * self.bins).astype(jnp.int32), 0, self.bins - 1)
        new = {"losses": jax.lax.stop_gradient(losses), "step": jnp.full_like(index, history["now"]), "index": index}
        every = {name: jnp.concatenate([history[name].reshape(-1), new[name]]) for name in new}
        bins = jnp.concatenate([jnp.repeat(jnp.arange(self.bins), self.memory), bin])
        order = jnp.lexsort((-every["index"], -every["step"], bins))  # by bin; in each the last one first
        first = jnp.searchsorted(bins[order], jnp.arange(self.bins))  # each has `memory` old ones at least
        last = order[first[:, None] + jnp.arange(self.memory)[None]]
        return history | {name: row[last] for name, row in every.items()}


QUANTILES = {"independent": Independent, "stratified": Stratified, "importance": Importance}
