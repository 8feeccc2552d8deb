"""Lower bounds of log p(x), and the loss that training makes of one."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from diffusion_jax import rng
from diffusion_jax.types import Array


class Terms(NamedTuple):
    """What one draw z ~ q(z | x) says of each image x; z_l are the latents of level l, z_<l those of the levels above.

    Attributes:
      log_likelihood: log p(x | z) f[B].
      kl: KL(q(z_l | z_<l, x) || p(z_l | z_<l)) f[B,L], in closed form given the z_<l that were drawn.
      log_ratio: log p(z) - log q(z | x) f[B] at the z that was drawn; its mean over draws is that of -sum_l kl.
    """

    log_likelihood: Array
    kl: Array
    log_ratio: Array


# ------------------------------------------------------------------------------------------ training


def training_loss(terms: Terms, weight: Array, free_nats: float) -> Array:
    """-log p(x | z) + weight * sum_l max(free_nats, KL_l), f[B] in nats; the negative ELBO for weight 1 and none free.

    The weight is beta (Higgins et al. 2017, eq. 4). No level is pushed to say less than `free_nats` of an image (Kingma
    et al. 2016, eq. 15). The paper takes the maximum of a minibatch's mean KL, we of each image's, so that the loss of
    a batch is the mean of its parts' losses.
    """
    return -terms.log_likelihood + weight * jnp.sum(jnp.maximum(terms.kl, free_nats), axis=1)


def warmed_up(beta: float, warmup: int, step: Array) -> Array:
    """The KL's weight f[] at step i32[]: beta min(1, step / warmup), and beta at once where `warmup` is 0.

    Latents learn to say something before it costs (Bowman et al. 2016, section 3.1; Sønderby et al. 2016).
    """
    return beta * jnp.minimum(1.0, step.astype(jnp.float32) / warmup) if warmup else jnp.float32(beta)


# ------------------------------------------------------------------------------------------ evaluation


class Bound(Protocol):
    """A row of `BOUNDS`."""

    def __call__(self, terms: Callable[[Array], Terms], keys: Array) -> Array:
        """A lower bound of log p(x) f[B] in nats, from `terms` of draws made with key[B]; exact where q(z | x) is."""
        ...


@dataclass(frozen=True, kw_only=True)
class ELBO:
    """E_q log p(x | z) - KL(q(z | x) || p(z)), the evidence lower bound (Kingma & Welling 2014, eq. 3).

    Attributes:
      draws: of z, over which it is averaged; they lower the estimate's variance.
    """

    draws: int = 1

    def __post_init__(self) -> None:
        _check(self.draws)

    def __call__(self, terms: Callable[[Array], Terms], keys: Array) -> Array:
        """See `Bound`."""

        def add(i: Array, total: Array) -> Array:
            drawn = terms(rng.fold(keys, i))
            return total + drawn.log_likelihood - jnp.sum(drawn.kl, axis=1)

        return jax.lax.fori_loop(0, self.draws, add, jnp.zeros(len(keys))) / self.draws


@dataclass(frozen=True, kw_only=True)
class Importance:
    """log 1/K sum_k p(x | z_k) p(z_k) / q(z_k | x), the importance-weighted bound (Burda et al. 2016, eq. 8).

    Its mean grows with K, from the ELBO's to log p(x).

    Attributes:
      draws: K.
    """

    draws: int = 64

    def __post_init__(self) -> None:
        _check(self.draws)

    def __call__(self, terms: Callable[[Array], Terms], keys: Array) -> Array:
        """See `Bound`."""

        def add(i: Array, total: Array) -> Array:
            drawn = terms(rng.fold(keys, i))
            return jnp.logaddexp(total, drawn.log_likelihood + drawn.log_ratio)

        return jax.lax.fori_loop(0, self.draws, add, jnp.full(len(keys), -jnp.inf)) - math.log(self.draws)


def _check(draws: int) -> None:
    if draws < 1:
        raise ValueError(f"draws must be at least 1, not {draws}")


BOUNDS = {"elbo": ELBO, "importance": Importance}
