"""Learning the variance of the ancestral step beside its mean (Nichol & Dhariwal 2021, section 3.1).

The process has T steps, from t = i / T to s = (i - 1) / T. With r = SNR_t / SNR_s (see `solvers.kernel`) the step's
log variance lies between that of q(x_s | x_t, x0), their beta tilde, and that of q(x_t | x_s), their beta:

    log variance = v log(sigma_t^2 (1 - r)) + (1 - v) log(sigma_s^2 (1 - r))        (their eq. 15)
    L_hybrid     = L_simple + lambda L_vlb                                           (their eq. 16)

The network has twice the channels: the first half is y, as ever; the second, w, gives v = (w + 1) / 2. L_vlb sees the
mean as a constant, so that y is learned by L_simple alone, and v by L_vlb alone. L_T, the term of t = 1, which no
network changes, is left out.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.scipy.special import log_ndtr

from diffusion_jax import rng
from diffusion_jax.diffusion.broadcast import over
from diffusion_jax.diffusion.prediction import Prediction
from diffusion_jax.diffusion.schedule import first_time
from diffusion_jax.diffusion.solvers.kernel import forward_kernel
from diffusion_jax.diffusion.time_sampling import TimeSampling
from diffusion_jax.diffusion.weighting import Weighting
from diffusion_jax.types import Array, Denoised


@dataclass(frozen=True, kw_only=True)
class LearnedVariance:
    """L_hybrid: see `Objective`.

    Attributes:
      prediction: what y is.
      time_sampling: its times are rounded up to the T steps. The paper's is uniform; one that hardly looks at some
        steps makes a poor estimate of L_vlb, their sum.
      weighting: of y's squared error.
      levels: grey levels of the data, for the last step, which ends in a level and not in a density.
      steps: T.
      vlb_weight: lambda, for L_vlb in bits per dimension.
    """

    prediction: Prediction
    time_sampling: TimeSampling
    weighting: Weighting
    levels: int
    steps: int = 1000
    vlb_weight: float = 0.001

    def __post_init__(self) -> None:
        if self.levels < 2:
            raise ValueError(f"levels must be at least 2, not {self.levels}")
        if self.steps < 2:
            raise ValueError(f"steps must be at least 2, not {self.steps}")
        if not 0.0 <= self.vlb_weight < math.inf:
            raise ValueError(f"vlb_weight must be a number from 0 on, not {self.vlb_weight}")

    def channels(self, image: int) -> int:  # noqa: D102
        return 2 * image

    def denoised(self, x: Array, y: Array, t: Array) -> Denoised:  # noqa: D102
        y, v = _halves(y)
        return Denoised(*self.prediction.split(x, y, t), spread=jnp.clip(v, 0.0, 1.0))

    def loss(  # noqa: D102
        self, predict: Callable[[Array, Array], Array], x0: Array, u: Array, keys: Array
    ) -> tuple[Array, Array]:
        schedule = self.prediction.schedule
        (s, t), slope = self.step_of(u)
        eps = rng.normal(keys, x0.shape[1:], x0.dtype)
        x = over(schedule.alpha(t), x0) * x0 + over(schedule.sigma(t), x0) * eps

        y, v = _halves(predict(x, t).astype(x0.dtype))
        error = jnp.mean(jnp.square(self.prediction.target(x0, eps, t) - y), axis=(1, 2, 3))
        simple = self.weighting(self.prediction, t, slope) * error
        guess = self.prediction.split(x, jax.lax.stop_gradient(y), t)
        vlb = self.steps * slope * self.step_bits((x0, eps), guess, v, s, t)
        return simple + self.vlb_weight * vlb, t

    def step_of(self, u: Array) -> tuple[tuple[Array, Array], Array]:
        """((s, t), slope) of quantiles u, f[B] each: the step t - 1/T to t, and 1 / (density of t)."""
        schedule = self.prediction.schedule

        def way(u: Array) -> Array:
            first = first_time(schedule).astype(u.dtype)
            return (self.time_sampling(schedule, u) - first) / (1.0 - first)

        share, slope = jax.jvp(way, (u,), (jnp.ones_like(u),))
        i = jnp.clip(jnp.ceil(share * self.steps), 1.0, self.steps)
        return ((i - 1.0) / self.steps, i / self.steps), slope

    def step_bits(self, truth: tuple[Array, Array], guess: tuple[Array, Array], v: Array, s: Array, t: Array) -> Array:
        """One step's term of L_vlb, f[B] in bits per dimension; the mean over the T steps is L_vlb / T.

        KL(q(x_s | x_t, x0) || p(x_s | x_t)), and -log p(x0 | x_t) where s = 0 (Ho et al. 2020, eq. 5).

        Args:
          truth: (x0, eps) f[B,H,W,C] each, of which x_t is made.
          guess: (x0, eps) as the network has them.
          v: f[B,H,W,C].
          s: f[B], where the step ends.
          t: f[B], where it begins.
        """
        schedule = self.prediction.schedule
        _, r = forward_kernel(schedule, s, t)
        mean = lambda x0, eps: over(schedule.alpha(s), v) * x0 + over(jnp.sqrt(r) * schedule.sigma(s), v) * eps
        least, largest = self.log_variances(s, t)
        log_variance = v * over(largest, v) + (1.0 - v) * over(least, v)
        kl = gaussian_kl(mean(*truth), over(least, v), mean(*guess), log_variance)
        last = level_nll(truth[0], guess[0], log_variance, self.levels)
        return jnp.mean(jnp.where(over(s, v) > 0.0, kl, last), axis=(1, 2, 3)) / math.log(2.0)

    def log_variances(self, s: Array, t: Array) -> tuple[Array, Array]:
        """The least and the largest log variance of the step from t to s, f[B] each.

        The least at s = 0 would be log 0; the step before lends it its own (their code; the paper does not say).
        """
        schedule = self.prediction.schedule
        end = jnp.maximum(s, 1.0 / self.steps)
        begin = jnp.maximum(t, 2.0 / self.steps)
        (_, r), (_, r_least) = forward_kernel(schedule, s, t), forward_kernel(schedule, end, begin)
        least = 2.0 * jnp.log(schedule.sigma(end)) + jnp.log1p(-r_least)
        return least, 2.0 * jnp.log(schedule.sigma(t)) + jnp.log1p(-r)


def _halves(output: Array) -> tuple[Array, Array]:
    """(y, v) f[B,H,W,C] each, of the network's output f[B,H,W,2C]. Nothing but the loss keeps v within [0, 1]."""
    y, w = jnp.split(output, 2, axis=-1)
    return y, 0.5 * (w + 1.0)


def gaussian_kl(mean_q: Array, log_variance_q: Array, mean_p: Array, log_variance_p: Array) -> Array:
    """KL(q || p) of two normal distributions in nats, elementwise."""
    difference = log_variance_q - log_variance_p
    square = jnp.square(mean_q - mean_p) * jnp.exp(-log_variance_p)
    return 0.5 * (jnp.exp(difference) - difference - 1.0 + square)


def level_nll(x0: Array, mean: Array, log_variance: Array, levels: int) -> Array:
    """-log P(x0) in nats, elementwise: the normal distribution over the level's cell (Ho et al. 2020, eq. 13).

    The cells of the lowest and the highest level are open to their side, so that all of them sum to 1.
    """
    half, std = 1.0 / (levels - 1), jnp.exp(0.5 * log_variance)
    low, high = (x0 - half - mean) / std, (x0 + half - mean) / std
    # Phi(high) - Phi(low) = Phi(-low) - Phi(-high): of the two, the one whose terms are small keeps its digits.
    lower, upper = jnp.where(low > 0.0, -high, low), jnp.where(low > 0.0, -low, high)
    inside = log_ndtr(upper) + jnp.log(-jnp.expm1(log_ndtr(lower) - log_ndtr(upper)))
    below, above = x0 < -1.0 + half, x0 > 1.0 - half
    return -jnp.where(below, log_ndtr(high), jnp.where(above, log_ndtr(-low), inside))
