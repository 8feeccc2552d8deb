"""A schedule with parameters: any falling log-SNR between two fixed ends (Kingma et al. 2021, VDM, appendix H).

    learned = Learned()
    params = learned.init(key)          a pytree, to be trained beside the network's
    schedule = learned.bind(params)     a `Schedule`

How it is trained (their section 5 and appendix I.2): the variational bound, the weighting `elbo`, depends on the ends
of log-SNR alone and not on the way between them, so its mean has no gradient for these parameters. Its estimate at one
random time has a variance, though, and that is what they minimise: with the times `uniform` the mean stays, so
descending E[loss^2], one loss an example, descends the variance. The ends are fixed here: the paper learns them from
the bound's other two terms, which a denoising objective does not have.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from diffusion_jax.types import Array, Tree

BISECTIONS = 30


@dataclass(frozen=True, kw_only=True)
class Learned:
    """gamma(t) = gamma_0 + (gamma_1 - gamma_0) w(t), w from 0 to 1: a monotone network of one hidden layer.

        w(t) = (g(t) - g(0)) / (g(1) - g(0)),
        g(t) = t + mean_j softplus(c_j) sigmoid(softplus(a_j) (2 t - 1) + b_j)

    Attributes:
      logsnr_max: -gamma_0; 13.3 in the paper.
      logsnr_min: -gamma_1; -5 in the paper.
      hidden: number of hidden units j.
    """

    logsnr_max: float = 13.3
    logsnr_min: float = -5.0
    hidden: int = 1024

    def __post_init__(self) -> None:
        low, high = self.logsnr_min, self.logsnr_max
        if not -40.0 <= low <= high - 1.0 <= 39.0:  # float32 has exp(logsnr_max - logsnr_min)
            raise ValueError(f"logsnr_min must lie below logsnr_max, by 1, both in [-40, 40], not be {low} and {high}")
        if self.hidden < 1:
            raise ValueError(f"hidden must be positive, not {self.hidden}")

    def init(self, key: Array) -> Tree:
        """`a`, `b`, `c` f32[hidden]: bends of the curve, spread over [0, 1]."""
        a, b, c = (jax.random.normal(k, (self.hidden,)) for k in jax.random.split(key, 3))
        return {"a": 2.0 + a, "b": 2.0 * b, "c": c}

    def bind(self, params: Tree) -> "BoundLearned":
        """The schedule at these parameters; differentiable with respect to them."""
        return BoundLearned(learned=self, params=params)


@dataclass(frozen=True, kw_only=True)
class BoundLearned:
    """Variance preserving: sigma^2 / alpha^2 = exp(gamma(t)) - exp(gamma(0)).

    The paper's is exp(gamma(t)), whose data at t = 0 keep some noise. As in `ve`, what counts here is the noise added
    since; at t = 1 the two differ by exp(-18.3).
    """

    learned: Learned
    params: Tree

    @property
    def _range(self) -> float:
        return self.learned.logsnr_max - self.learned.logsnr_min

    def _warped(self, t: Array) -> Array:
        """w(t)."""
        a, b, c = (self.params[name].astype(t.dtype) for name in ("a", "b", "c"))
        slope, scale = jax.nn.softplus(a), jax.nn.softplus(c)
        start = b - slope

        @jnp.vectorize
        def risen(t: Array) -> Array:
            # g(t) - g(0), by S(y) - S(z) = S(y) S(-z) (1 - e^(z - y)): exactly 0 at t = 0
            rise = 2.0 * slope * t
            return t - jnp.mean(scale * jax.nn.sigmoid(start + rise) * jax.nn.sigmoid(-start) * jnp.expm1(-rise))

        return risen(t) / risen(jnp.ones((), t.dtype))

    def _noise(self, t: Array) -> Array:
        """sigma^2 / alpha^2."""
        return math.exp(-self.learned.logsnr_max) * jnp.expm1(self._range * self._warped(t))

    def alpha(self, t: Array) -> Array:  # noqa: D102
        return jax.lax.rsqrt(1.0 + self._noise(t))

    def sigma(self, t: Array) -> Array:  # noqa: D102
        noise = self._noise(t)
        return jnp.sqrt(noise / (1.0 + noise))

    def time(self, logsnr: Array) -> Array:
        """By bisection, and one step of Newton's method, through which derivatives pass."""
        w = jnp.clip(jax.nn.softplus(self.learned.logsnr_max - logsnr) / self._range, 0.0, 1.0)

        def halve(i: Array, t: Array) -> Array:
            step = jnp.exp2(-(i + 2).astype(t.dtype))
            return jnp.where(self._warped(t) < w, t + step, t - step)

        t = jax.lax.fori_loop(0, BISECTIONS, halve, jnp.full_like(w, 0.5))
        t = jax.lax.stop_gradient(t)
        at, slope = jax.jvp(self._warped, (t,), (jnp.ones_like(t),))
        return jnp.clip(t + (w - at) / slope, 0.0, 1.0)

    def label(self, t: Array) -> Array:
        """gamma(t) on [0, 1], as in the released code: a level of noise keeps its name while the schedule moves."""
        return self._warped(t)
