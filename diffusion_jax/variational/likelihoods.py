"""p(x | z): what the decoder's numbers say of an image's pixels, each of which is one of `levels` grey levels.

The grey levels are -1, -1 + step, ..., 1 with step = 2 / (levels - 1). Given the decoder's numbers all pixels are
independent; so are their channels, but for the mixture's.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from diffusion_jax import grey, rng
from diffusion_jax.types import Array
from diffusion_jax.variational import gaussian

LEAST_LOG_SCALE = -7.0
"""At 256 levels a logistic's log scale is at least this, as in openai/pixel-cnn: nothing narrower can be told there.

With fewer levels it is as many levels wide: a scale far below that would make a neighbour all but impossible."""

LOG_SCALES = (-15.0, 10.0)
"""No log scale lies outside, whatever the decoder gives: as CompVis/latent-diffusion keeps its log variances in
[-30, 20] (Rombach et al. 2022). No training is meant to come near; beyond, squares of exp leave float32."""


class Likelihood(Protocol):
    """A row of `LIKELIHOODS`. It is built with the images' `channels` and `levels` where it reads them."""

    @property
    def outputs(self) -> int:
        """P, how many numbers a pixel the decoder has to give."""
        ...

    def log_prob(self, params: Array, image: Array, keys: Array) -> Array:
        """log P(image) f[B] in nats, of discrete images f[B,H,W,C] in [-1,1] under the decoder's f[B,H,W,P].

        Where the row is a density, a lower bound of it in the mean over key[B] (see `Gaussian`).
        """
        ...

    def mean(self, params: Array) -> Array:
        """f[B,H,W,C], the expected image."""
        ...

    def draw(self, params: Array, keys: Array) -> Array:
        """f[B,H,W,C], an image drawn with key[B]."""
        ...


def _over_pixels(x: Array) -> Array:
    """The sum of each example, f[B]."""
    return jnp.sum(x.reshape(len(x), -1), axis=1)


# ------------------------------------------------------------------------------------------ Gaussian


@dataclass(frozen=True, kw_only=True)
class Gaussian:
    """A density: N(mean, std^2) of each number, the std fixed or given by the decoder beside the mean.

    A density says nothing of discrete data until noise u of a grey level's width is added (uniform dequantisation). By
    Jensen's inequality the mean over u of log p(x + u) + log step is at most log P(x) = log E p(x + u) step (Theis et
    al. 2016, section 3.1).

    Attributes:
      std: the standard deviation; where it is learned, the one at which the decoder's output 0 stands.
      learned: whether the decoder gives it, for each number of each image.
    """

    channels: int
    levels: int
    std: float = 0.1
    learned: bool = False

    def __post_init__(self) -> None:
        if self.std <= 0.0:
            raise ValueError(f"std must be positive, not {self.std}")

    @property
    def outputs(self) -> int:
        """See `Likelihood`."""
        return (2 if self.learned else 1) * self.channels

    def distribution(self, params: Array) -> gaussian.Gaussian:
        """N(mean, std^2) f[B,H,W,C] from f[B,H,W,P]."""
        mean, change = params[..., : self.channels], params[..., self.channels :]
        log_std = jnp.full_like(mean, math.log(self.std))
        return gaussian.Gaussian(mean, jnp.clip(log_std + change, *LOG_SCALES) if self.learned else log_std)

    def log_prob(self, params: Array, image: Array, keys: Array) -> Array:
        """See `Likelihood`."""
        log_density = gaussian.log_density(self.distribution(params), grey.dequantise(image, keys, self.levels))
        return _over_pixels(log_density + math.log(grey.step(self.levels)))

    def mean(self, params: Array) -> Array:
        """See `Likelihood`."""
        return params[..., : self.channels]

    def draw(self, params: Array, keys: Array) -> Array:
        """See `Likelihood`; not yet rounded to grey levels."""
        p = self.distribution(params)
        return gaussian.reparameterised(p, rng.normal(keys, p.mean.shape[1:], p.mean.dtype))


# ------------------------------------------------------------------------------------------ Bernoulli


@dataclass(frozen=True, kw_only=True)
class Bernoulli:
    """levels - 1 bits a number, each 1 with probability p = sigmoid(output); the grey level says how many are 1.

    For two levels this is the Bernoulli distribution. For more it is the binomial: log P differs from the usual
    cross-entropy of grey values by the factor levels - 1 and by a constant, and unlike it sums to 1 over the levels.
    """

    channels: int
    levels: int

    @property
    def outputs(self) -> int:
        """See `Likelihood`."""
        return self.channels

    def log_prob(self, params: Array, image: Array, keys: Array) -> Array:
        """See `Likelihood`."""
        n = self.levels - 1.0
        k = 0.5 * n * (image + 1.0)
        log_choices = math.lgamma(n + 1.0) - jax.lax.lgamma(k + 1.0) - jax.lax.lgamma(n - k + 1.0)
        return _over_pixels(log_choices + k * jax.nn.log_sigmoid(params) + (n - k) * jax.nn.log_sigmoid(-params))

    def mean(self, params: Array) -> Array:
        """2 p - 1."""
        return jnp.tanh(0.5 * params)

    def draw(self, params: Array, keys: Array) -> Array:
        """See `Likelihood`. Bit after bit, since an image of 255 bits a number is large."""
        p = jax.nn.sigmoid(params)

        def add(i: Array, total: Array) -> Array:
            u = rng.draw(rng.fold(keys, i), lambda key: jax.random.uniform(key, p.shape[1:], p.dtype))
            return total + (u < p).astype(p.dtype)

        ones = jax.lax.fori_loop(0, self.levels - 1, add, jnp.zeros_like(p))
        return ones * grey.step(self.levels) - 1.0


# ------------------------------------------------------------------------------------------ logistic mixture


class Mixture(NamedTuple):
    """K logistic distributions a pixel; the coefficients say how a channel's mean follows the channels before it.

    Attributes:
      log_weights: f[B,H,W,K].
      means: f[B,H,W,C,K].
      log_scales: f[B,H,W,C,K].
      coefficients: f[B,H,W,3,K] in (-1, 1): red's in green, red's in blue, green's in blue; f[B,H,W,0,K] for grey.
    """

    log_weights: Array
    means: Array
    log_scales: Array
    coefficients: Array


@dataclass(frozen=True, kw_only=True)
class DiscretisedLogisticMixture:
    """P(x) = sum_k w_k [F((x + step/2 - m_k) / s_k) - F((x - step/2 - m_k) / s_k)], F the logistic function.

    At x = -1 the lower F is 0, at x = 1 the upper one is 1: the outermost levels get the tails (Salimans et al. 2017,
    eq. 2). Of three channels, the means of the second and third follow the earlier ones linearly (section 2.2, eq. 3),
    and one k holds for the whole pixel.

    Attributes:
      components: K.
    """

    channels: int
    levels: int
    components: int = 5

    def __post_init__(self) -> None:
        if self.components < 1:
            raise ValueError(f"components must be at least 1, not {self.components}")
        if self.channels not in (1, 3):
            raise ValueError(f"images must have 1 or 3 channels, not {self.channels}")

    @property
    def outputs(self) -> int:
        """See `Likelihood`: 3 K for grey images, 10 K for coloured ones."""
        return self.components * (1 + 2 * self.channels + self.channels * (self.channels - 1) // 2)

    def mixture(self, params: Array) -> Mixture:
        """The K distributions from f[B,H,W,P]."""
        logits, rest = params[..., : self.components], params[..., self.components :]
        rows = rest.reshape(*params.shape[:-1], -1, self.components)
        means, log_scales, coefficients = jnp.split(rows, (self.channels, 2 * self.channels), axis=-2)
        least = LEAST_LOG_SCALE + math.log(grey.step(self.levels) / grey.step(256))
        log_scales = jnp.clip(log_scales, least, LOG_SCALES[1])
        return Mixture(jax.nn.log_softmax(logits), means, log_scales, jnp.tanh(coefficients))

    def log_prob(self, params: Array, image: Array, keys: Array) -> Array:
        """See `Likelihood`."""
        p, x = self.mixture(params), image[..., None]
        of_channels = _log_cell(x - _following(p, x), p.log_scales, x, grey.step(self.levels))
        return _over_pixels(jax.nn.logsumexp(p.log_weights + jnp.sum(of_channels, axis=-2), axis=-1))

    def mean(self, params: Array) -> Array:
        """Of the continuous mixture, clipped to [-1, 1]."""
        p = self.mixture(params)
        means = p.means
        for _ in range(self.channels):
            means = _following(p, means)
        return jnp.clip(jnp.sum(jnp.exp(p.log_weights)[..., None, :] * means, axis=-1), -1.0, 1.0)

    def draw(self, params: Array, keys: Array) -> Array:
        """See `Likelihood`: a component a pixel, then its logistic, rounded to a grey level.

        After the first round the first channel stands, after the second the second, which follows it, and so on.
        """
        p = _chosen(self.mixture(params), rng.fold(keys, 0))
        shape = p.means.shape[1:]
        noise = jnp.exp(p.log_scales) * rng.draw(rng.fold(keys, 1), lambda key: jax.random.logistic(key, shape))
        x = p.means
        for _ in range(self.channels):
            x = _rounded(_following(p, x) + noise, self.levels)
        return x[..., 0]


def _following(p: Mixture, x: Array) -> Array:
    """The components' means f[B,H,W,C,K], given the pixel's channels x f[B,H,W,C,K or 1]: eq. 3.

    m_r, m_g + a r, m_b + b r + c g
    """
    if p.means.shape[-2] == 1:
        return p.means
    red, green = x[..., 0, :], x[..., 1, :]
    a, b, c = (p.coefficients[..., i, :] for i in range(3))
    return p.means + jnp.stack([jnp.zeros_like(a), a * red, b * red + c * green], axis=-2)


def _log_cell(distance: Array, log_scale: Array, x: Array, step: float) -> Array:
    """log [F(u) - F(l)], of logistics at `distance` = x - mean, with u, l = (distance +- step/2) / scale.

    F(u) - F(l) = F(u) F(-l) (1 - exp(l - u)): no difference of two numbers near 1 is ever taken. Without its lower end
    (at x = -1) the cell has F(u) alone, without its upper one F(-l).
    """
    inverse = jnp.exp(-log_scale)
    below_upper = jax.nn.log_sigmoid((distance + 0.5 * step) * inverse)
    above_lower = jax.nn.log_sigmoid(-(distance - 0.5 * step) * inverse)
    lowest, highest = x < -1.0 + 0.5 * step, x > 1.0 - 0.5 * step
    both = below_upper + above_lower + jnp.log(-jnp.expm1(-step * inverse))
    return jnp.where(lowest, below_upper, jnp.where(highest, above_lower, both))


def _chosen(p: Mixture, keys: Array) -> Mixture:
    """One component a pixel, drawn by its weight: the same with K = 1."""
    logits = p.log_weights
    k = rng.draw(keys, lambda key: jax.random.gumbel(key, logits.shape[1:]))
    k = jnp.argmax(logits + k, axis=-1)[..., None, None]
    take = lambda rows: jnp.take_along_axis(rows, k, axis=-1)
    return Mixture(jnp.zeros_like(logits[..., :1]), take(p.means), take(p.log_scales), take(p.coefficients))


def _rounded(x: Array, levels: int) -> Array:
    """The nearest grey level."""
    step = grey.step(levels)
    return jnp.clip(jnp.round((x + 1.0) / step) * step - 1.0, -1.0, 1.0)


LIKELIHOODS = {
    "bernoulli": Bernoulli,
    "discretised_logistic_mixture": DiscretisedLogisticMixture,
    "gaussian": Gaussian,
}
