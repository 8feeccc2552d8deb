"""The VAE family: latents that an image could have come from, and images that latents could become.

Read top to bottom: what a user sets; how it becomes an autoencoder and a likelihood; the loss; sampling; bits per
dimension.

    z ~ p(z) = N(0, 1)                                          latents, before there is an image
    x ~ p(x | z)                                                the decoder: how likely each grey level of each pixel is
    q(z | x) = N(m, s^2)                                        the encoder: which latents x could have come from
    log p(x) >= E_q log p(x | z) - KL(q(z | x) || p(z))         the ELBO, which both are trained to raise

Of several levels of latents each has a prior N(mu, sigma^2) and a posterior N(mu + sigma m, (sigma s)^2), given those
above it. z stands here for (latent - mu) / sigma in every level, so that the four lines hold as they are: a divergence
does not depend on the units in which it is measured.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax import grey, plugs, rng
from diffusion_jax.errors import require
from diffusion_jax.networks import vae as networks
from diffusion_jax.settings import from_section
from diffusion_jax.types import Array, Aux, Batch, Condition, Context, Family, ImageSpec, Latent, Player, Tree, Weights
from diffusion_jax.variational.bounds import BOUNDS, Bound, Terms, training_loss, warmed_up
from diffusion_jax.variational.gaussian import STANDARD, Gaussian, kl, log_density, reparameterised
from diffusion_jax.variational.likelihoods import LIKELIHOODS, Likelihood
from diffusion_jax.variational.likelihoods import Gaussian as GaussianPixels

# ---------------------------------------------------------------------------------------------- what a user sets


@dataclass(frozen=True, kw_only=True)
class FamilySettings:
    """The config's `family` section. Each string names a row of a table, with options: `"gaussian(std=0.2)"`.

    Attributes:
      network: from `networks.vae.AUTOENCODERS`.
      pixels: from `variational.likelihoods.LIKELIHOODS`, the distribution of an image given its latents.
      beta: weight of the KL in the loss; 1 is the ELBO.
      free_bits: bits that every level of latents may say of an image at no cost.
      warmup: steps over which the KL's weight grows from 0 to beta; 0 for none.
      likelihood: from `variational.bounds.BOUNDS`, how bits per dimension are measured.
    """

    network: str = "ladder"
    pixels: str = "discretised_logistic_mixture"
    beta: float = 1.0
    free_bits: float = 0.0
    warmup: int = 0
    likelihood: str = "importance"

    def __post_init__(self) -> None:
        for name in ("beta", "free_bits", "warmup"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"family.{name}", value, "must be a number from 0 on")


SHOWN = ("draw", "mean")


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """The family's part of the config's `sample` section.

    Attributes:
      temperature: standard deviation of the latents, over the prior's own.
      show: "draw", an image drawn from the decoder's distribution of pixels, or its "mean".
    """

    temperature: float = 1.0
    show: str = "draw"

    def __post_init__(self) -> None:
        require(0.0 < self.temperature < math.inf, "sample.temperature", self.temperature, "must be positive")
        require(self.show in SHOWN, "sample.show", self.show, f"must be one of {', '.join(SHOWN)}")


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `generate`, all traced: new values compile nothing."""

    temperature: Array  # f32[]
    draw: Array  # bool[]


# ---------------------------------------------------------------------------------------------- how it is built


def build(settings: FamilySettings, spec: ImageSpec, precision: str) -> Family:
    """The family for images of `spec`, computing in `precision`.

    Raises:
      UserError: for an unknown row or option, or sizes that do not fit `spec`.
    """
    about = {"channels": spec.channels, "levels": spec.levels}
    pixels = plugs.build("family.pixels", settings.pixels, LIKELIHOODS, **about)
    return Model(
        spec=spec,
        autoencoder=networks.build("family.network", settings.network, spec, precision, pixels.outputs),
        pixels=pixels,
        beta=settings.beta,
        free_nats=settings.free_bits * math.log(2.0),
        warmup=settings.warmup,
        bound=plugs.build("family.likelihood", settings.likelihood, BOUNDS),
    ).family()


@dataclass(frozen=True, kw_only=True)
class Model:
    """The parts, put together."""

    spec: ImageSpec
    autoencoder: networks.Autoencoder
    pixels: Likelihood
    beta: float
    free_nats: float
    warmup: int
    bound: Bound

    def family(self) -> Family:
        """What everyone else sees of the model."""
        return Family(
            name="vae",
            players=(Player(name="autoencoder", loss=self.loss),),
            init=self.init,
            generate=self.generate,
            sampling=self.sampling,
            nll=self.nll,
            dequantised=isinstance(self.pixels, GaussianPixels),
            latent=Latent(shape=self.shape, draw=self.draw, decode=self.decode, encode=self.encode),
        )

    @property
    def shape(self) -> tuple[int]:
        """Of an image's latents, all levels one after the other, the coarsest first."""
        return (sum(self.autoencoder.levels),)

    def init(self, key: Array) -> tuple[Weights, Tree]:
        """Encoder and decoder are one player's; there is no extra state."""
        return {"autoencoder": self.autoencoder.init(key)}, {}

    # ------------------------------------------------------------------------------------------ training

    def loss(self, params: Weights, ctx: Context) -> tuple[Array, Aux]:
        """The negative ELBO a dimension, in nats, with the KL weighted: see `bounds.training_loss`."""
        terms = self.terms(params, ctx.batch, rng.example_keys(ctx.key, ctx.batch["index"]))
        weight = warmed_up(self.beta, self.warmup, ctx.step)
        loss = jnp.mean(training_loss(terms, weight, self.free_nats)) / math.prod(self.spec.shape)
        bits = self.bits(jnp.sum(terms.kl, axis=1) - terms.log_likelihood)
        metrics = {"bits_per_dimension": jnp.mean(bits), "kl": jnp.mean(jnp.sum(terms.kl, axis=1))}
        return loss, Aux(metrics=metrics, extra=ctx.extra)

    def terms(self, weights: Weights, batch: Batch, keys: Array) -> Terms:
        """What one draw of latents a key says of each image of the batch."""
        eps = rng.normal(rng.fold(keys, 0), self.shape)
        mean, log_std, params = self.infer(weights, batch["image"], batch, eps)
        q = Gaussian(mean, log_std)
        z = reparameterised(q, eps)
        return Terms(
            log_likelihood=self.pixels.log_prob(params, batch["image"], rng.fold(keys, 1)),
            kl=self.by_level(kl(q)),
            log_ratio=jnp.sum(log_density(STANDARD, z) - log_density(q, z), axis=1),
        )

    def infer(self, weights: Weights, image: Array, condition: Condition, eps: Array) -> networks.Inferred:
        """The posterior of the images' latents, and the decoder's numbers for the draw that eps f32[B,D] makes."""
        return self.autoencoder.infer(weights["autoencoder"], image, self.label(condition), eps)

    def label(self, condition: Condition) -> Array | None:
        """i32[B], or None for data without classes."""
        return condition["label"] if self.spec.num_classes else None

    def by_level(self, x: Array) -> Array:
        """f32[B,D] -> the sum over each level f32[B,L]."""
        ends = list(itertools.accumulate(self.autoencoder.levels))[:-1]
        return jnp.stack([jnp.sum(level, axis=1) for level in jnp.split(x, ends, axis=1)], axis=1)

    # ------------------------------------------------------------------------------------------ sampling

    def generate(self, weights: Weights, keys: Array, condition: Condition, options: Options) -> Array:
        """Images f32[n,H,W,C] in [-1,1], one for each of keys key[n]: latents from the prior, then the decoder."""
        return self.decode(weights, self.draw(keys, options), keys, condition, options)

    def draw(self, keys: Array, options: Options) -> Array:
        """Latents f32[n,D] from the prior, of the given temperature."""
        return options.temperature * rng.normal(rng.fold(keys, 0), self.shape)

    def decode(self, weights: Weights, z: Array, keys: Array, condition: Condition, options: Options) -> Array:
        """Images f32[n,H,W,C] in [-1,1] from latents f32[n,D]; keys draw the pixels where a draw is shown."""
        params = self.autoencoder.decode(weights["autoencoder"], z, self.label(condition))
        drawn, mean = self.pixels.draw(params, rng.fold(keys, 1)), self.pixels.mean(params)
        return jnp.clip(jnp.where(options.draw, drawn, mean), -1.0, 1.0)

    def encode(self, weights: Weights, images: Array, keys: Array, condition: Condition, options: Options) -> Array:
        """The mean latents f32[n,D] of images: of each level the posterior's, given the means of those above it."""
        return self.infer(weights, images, condition, jnp.zeros((len(images), *self.shape))).mean

    def sampling(self, section: Mapping[str, Any]) -> Options:
        """Check the config's `sample` section and make it options of `generate`."""
        settings = from_section(SampleSettings, section, "sample")
        return Options(temperature=jnp.float32(settings.temperature), draw=jnp.bool_(settings.show == "draw"))

    # ------------------------------------------------------------------------------------------ likelihood

    def nll(self, weights: Weights, batch: Batch, key: Array) -> Array:
        """Bits per dimension f32[B] of the batch's discrete images under their labels, in the mean at least -log P.

        Under pixels that are a density the images are made continuous by uniform noise of one grey level's width, as
        many levels as the data has, and log P is bounded by the density's mean over the level (see `Gaussian` there).
        """
        keys = rng.example_keys(key, batch["index"])
        return self.bits(-self.bound(lambda keys: self.terms(weights, batch, keys), keys))

    def bits(self, nats: Array) -> Array:
        """Nats an image as bits a dimension."""
        return grey.bits_per_dimension(nats, math.prod(self.spec.shape))
