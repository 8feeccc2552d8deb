"""The tokenizer family, stage one: an autoencoder whose codes or latents other families will model.

Read top to bottom: what a user sets; how it becomes an autoencoder and a game; the two losses; the weight between them;
images without an image.

    x' = D(z),  z = bottleneck(E(x))                                          the reconstruction
    autoencoder:    E [error(x, x') + bottleneck's own loss] + lambda E l_G(J(x), J(x'))
    discriminator:  E l_D(J(x), J(x'))                                        moves first, judges each patch of x'

    error  = |x - x'| or |x - x'|^2, and a weight times a perceptual distance where one is named
    lambda = weight |grad_W E error| / (|grad_W E l_G| + 10^-4)               W: kernel of the decoder's last layer

(Esser et al. 2021, eq. 4 to 7; 10^-4 as in CompVis/taming-transformers.) The norms in lambda are of a whole batch,
which a microbatch does not see: so lambda is that of the step before. Without a discriminator only the first line of
the losses is left, and there is one player.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from diffusion_jax import plugs, rng, tree
from diffusion_jax.adversarial.losses import LOSSES, Loss
from diffusion_jax.errors import require
from diffusion_jax.networks import presets
from diffusion_jax.networks import tokenizer as networks
from diffusion_jax.settings import from_section
from diffusion_jax.tokenizers import autoencoder, bottlenecks
from diffusion_jax.tokenizers.autoencoder import Autoencoder
from diffusion_jax.tokenizers.bottlenecks import codes
from diffusion_jax.tokenizers.bottlenecks.base import Passed
from diffusion_jax.tokenizers.perceptual import PERCEPTUALS, Perceptual
from diffusion_jax.types import Array, Aux, Condition, Context, Family, ImageSpec, Latent, Player, Tree, Weights

# ---------------------------------------------------------------------------------------------- what a user sets

ERRORS = {
    "l1": lambda x, y: jnp.mean(jnp.abs(x - y), axis=(1, 2, 3)),
    "l2": lambda x, y: jnp.mean(jnp.square(x - y), axis=(1, 2, 3)),
}
"""How far apart two images f32[n,H,W,C] are: f32[n]."""


COLLAPSED = 0.1
"""Share of codes in use, over the share that can have been seen, below which a codebook has collapsed.

Of few codes one is more than that: a codebook of which only one is in use has collapsed, too.
"""

LOPSIDED = 0.02
"""Perplexity over the number of codes, over the same share, below which it has, too: nearly all tokens are a few codes.

Backgrounds are such, too: digits on an empty canvas, well written, had 0.2 (docs/families.md).
"""


@dataclass(frozen=True, kw_only=True)
class FamilySettings:
    """The config's `family` section. Each string but `error` names a row of a table, with options.

    Attributes:
      network: from `networks.tokenizer.CODECS`, the encoder and the decoder.
      bottleneck: from `tokenizers.bottlenecks.BOTTLENECKS`; where empty, the one that a preset of `network` was
        published with, or vq.
      error: from `ERRORS`, of the reconstruction.
      perceptual: from `tokenizers.perceptual.PERCEPTUALS`, a distance beside the error; none where empty.
      discriminator: from `networks.tokenizer.DISCRIMINATORS`; none where empty.
      loss: from `adversarial.losses.LOSSES`.
      balance: from `BALANCES`, the weight of the adversarial loss.
      discriminator_start: step at which the discriminator enters, once there is something to judge.
      discriminator_rate: the discriminator's learning rate over the autoencoder's.
    """

    network: str = "vqgan(channels=32,multipliers=(1,2),blocks=1)"
    bottleneck: str = ""
    error: str = "l1"
    perceptual: str = ""
    discriminator: str = ""
    loss: str = "hinge"
    balance: str = "adaptive"
    discriminator_start: int = 0
    discriminator_rate: float = 1.0

    def __post_init__(self) -> None:
        require(self.error in ERRORS, "family.error", self.error, f"must be one of {', '.join(ERRORS)}")
        start = self.discriminator_start
        require(start >= 0, "family.discriminator_start", start, "must be at least 0")
        positive = 0.0 < self.discriminator_rate < math.inf
        require(positive, "family.discriminator_rate", self.discriminator_rate, "must be positive")


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """The family's part of the config's `sample` section: there is nothing to choose."""


class Gradients(NamedTuple):
    """Sums over images of what the two losses ask of the decoder's last kernel.

    Attributes:
      step: i32[], of which the sums are.
      weight: f32[], the adversarial loss's in that step.
      error: sum of grad_W error, of that step so far.
      adversarial: sum of grad_W l_G, likewise.
      images: f32[], in the sums.
    """

    step: Array
    weight: Array
    error: Array
    adversarial: Array
    images: Array


class Balance(Protocol):
    """A row of `BALANCES`: how much of the adversarial loss there is."""

    measures: bool

    def __call__(self, gradients: Gradients) -> Array:
        """The weight f32[] in the step after the one that `gradients` are of."""
        ...


@dataclass(frozen=True, kw_only=True)
class Adaptive:
    """As strong as the error, times `weight`: eq. 7, never above `most`. 0 in the discriminator's first step."""

    weight: float = 1.0
    most: float = 1e4

    measures = True

    def __post_init__(self) -> None:
        _check_positive(weight=self.weight, most=self.most)

    def __call__(self, gradients: Gradients) -> Array:
        """See `Balance`."""
        n = jnp.maximum(gradients.images, 1.0)
        ratio = tree.norm(gradients.error / n) / (tree.norm(gradients.adversarial / n) + 1e-4)
        return self.weight * jnp.minimum(ratio, self.most)


@dataclass(frozen=True, kw_only=True)
class Fixed:
    """Always `weight`."""

    weight: float = 0.1

    measures = False

    def __post_init__(self) -> None:
        _check_positive(weight=self.weight)

    def __call__(self, gradients: Gradients) -> Array:
        """See `Balance`."""
        return jnp.float32(self.weight)


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0.0:
            raise ValueError(f"{name} must be positive, not {value}")


BALANCES = {"adaptive": Adaptive, "fixed": Fixed}


# ---------------------------------------------------------------------------------------------- how it is built


def build(settings: FamilySettings, spec: ImageSpec, precision: str) -> Family:
    """The family for images of `spec`, computing in `precision`; labels are not looked at.

    Raises:
      UserError: for an unknown row or option, or networks that do not fit `spec`.
    """
    judge, seen = settings.discriminator, settings.perceptual
    return Model(
        autoencoder=autoencoder.build(settings.network, _bottleneck(settings), spec, precision),
        discriminator=networks.build_discriminator("family.discriminator", judge, spec, precision) if judge else None,
        error=ERRORS[settings.error],
        perceptual=plugs.build("family.perceptual", seen, PERCEPTUALS, spec=spec) if seen else None,
        loss=plugs.build("family.loss", settings.loss, LOSSES),
        balance=plugs.build("family.balance", settings.balance, BALANCES),
        start=settings.discriminator_start,
        rate=settings.discriminator_rate,
    ).family()


def _bottleneck(settings: FamilySettings) -> str:
    """The bottleneck that the config names, or that belongs to its network."""
    network = plugs.parse("family.network", settings.network)[0]
    return settings.bottleneck or (network if network in presets.FIRST_STAGES else "vq")


def function_of(section: Mapping[str, Any]) -> dict[str, Any]:
    """What of a config's `family` section says, with the parameters, what the frozen tokenizer does: plain data.

    The network, and of the bottleneck what is no matter of training alone. Losses and the discriminator are not in it.
    """
    settings = from_section(FamilySettings, {key: value for key, value in section.items() if key != "name"}, "family")
    between = bottlenecks.build("family.bottleneck", _bottleneck(settings), dimensions=1)
    return {"network": settings.network} | bottlenecks.function_of(between)


@dataclass(frozen=True, kw_only=True)
class Model:
    """The parts, put together."""

    autoencoder: Autoencoder
    discriminator: networks.Discriminator | None
    error: Callable[[Array, Array], Array]
    perceptual: Perceptual | None
    loss: Loss
    balance: Balance
    start: int
    rate: float

    def family(self) -> Family:
        """What everyone else sees of the model."""
        players = [Player(name="autoencoder", loss=self.autoencoder_loss, settle=self.settle)]
        if self.discriminator:
            judge = Player(name="discriminator", loss=self.discriminator_loss, rate=self.rate, start=self.start)
            players.insert(0, judge)
        return Family(
            name="tokenizer",
            players=tuple(players),
            init=self.init,
            generate=self.generate,
            sampling=self.sampling,
            latent=Latent(shape=self.shape, draw=self.draw, decode=self.decode, encode=self.encode),
            warnings=self.warnings,
            frozen=self.frozen if self.perceptual else None,
            tokenizer=self.autoencoder.tokenizer("autoencoder"),
        )

    def init(self, key: Array) -> tuple[Weights, Tree]:
        """Parameters by player, and what changes without gradient."""
        params, extra = self.autoencoder.init(rng.stream(key, "autoencoder"))
        weights, extra = {"autoencoder": params}, {"bottleneck": extra}
        if self.discriminator:
            weights["discriminator"] = self.discriminator.init(rng.stream(key, "discriminator"))
            extra["gradients"] = self.unmeasured(params)
        return weights, extra

    def settle(self, params: Tree, extra: Tree) -> Tree:
        """The autoencoder's parameters after an update, as the bottleneck wants them."""
        return self.autoencoder.bottleneck.settle(params, extra["bottleneck"])

    # ------------------------------------------------------------------------------------------ training

    def reconstructed(self, params: Weights, ctx: Context) -> tuple[Array, Passed]:
        """x' of the batch, and what the bottleneck says. By the common key: the same for both players."""
        keys = rng.example_keys(ctx.common, ctx.batch["index"])
        extra = ctx.extra["bottleneck"]
        return self.autoencoder.train(params["autoencoder"], extra, ctx.batch["image"], keys, ctx.step)

    def judged(self, params: Weights, x: Array) -> Array:
        """J(x), a logit a patch: f32[n,h,w]."""
        return self.discriminator.apply(params["discriminator"], x)

    def discriminator_loss(self, params: Weights, ctx: Context) -> tuple[Array, Aux]:
        """E l_D(J(x), J(x')) over patches."""
        real = self.judged(params, ctx.batch["image"])
        fake = self.judged(params, self.reconstructed(params, ctx)[0])
        loss = jnp.mean(self.loss.discriminator(real, fake))
        return loss, Aux(metrics={"real": jnp.mean(real), "fake": jnp.mean(fake)}, extra=ctx.extra)

    def autoencoder_loss(self, params: Weights, ctx: Context) -> tuple[Array, Aux]:
        """E [error + the bottleneck's loss], and lambda E l_G from step `start` on."""
        made, passed = self.reconstructed(params, ctx)
        errors = self.apart(ctx, made)
        loss, extra = jnp.mean(errors + passed.loss), {"bottleneck": passed.extra}
        metrics = {"error": jnp.mean(errors)} | passed.metrics
        if self.discriminator:
            gradients = self.begun(ctx.extra["gradients"], ctx.step)
            adversarial, gradients = jax.lax.cond(
                ctx.step >= self.start,
                lambda: self.adversarial(params, ctx, made, passed.z, gradients),
                lambda: (jnp.float32(0.0), gradients),
            )
            loss = loss + gradients.weight * adversarial
            metrics |= {"adversarial": adversarial, "balance": gradients.weight}
            extra["gradients"] = gradients
        return loss, Aux(metrics=metrics, extra=extra)

    def apart(self, ctx: Context, made: Array) -> Array:
        """How far the batch's images and what is `made` of them are apart, f32[B]."""
        image = ctx.batch["image"]
        errors = self.error(image, made)
        if self.perceptual is None:
            return errors
        return errors + self.perceptual.weight * self.perceptual(ctx.frozen["perceptual"], image, made)

    def frozen(self, classifier: Callable[[], Tree]) -> Tree:
        """See `Family.frozen`."""
        return {"perceptual": self.perceptual.load(classifier)}

    def adversarial(
        self, params: Weights, ctx: Context, made: Array, z: Array, gradients: Gradients
    ) -> tuple[Array, Gradients]:
        """(E l_G over patches, `gradients` with this batch in it)."""
        real = self.judged(params, ctx.batch["image"])
        fooled = lambda made: jnp.mean(self.loss.generator(real, self.judged(params, made)), axis=(1, 2))
        if self.balance.measures:
            gradients = self.measured(params, ctx, z, fooled, gradients)
        return jnp.mean(fooled(made)), gradients

    def warnings(self, metrics: Mapping[str, float]) -> dict[str, str]:
        """`collapse`, once few of the codes are in use, or nearly all tokens are a few of them."""
        codebook = self.autoencoder.vocabulary
        if codebook < 2:  # latents, or a code that is always the same
            return {}
        of_player = "autoencoder/" if self.discriminator else ""
        of = lambda name, otherwise: metrics.get(f"{of_player}{name}", otherwise)
        usage, usable, perplexity = of("usage", 1.0), of("usable", 1.0), of("perplexity", codebook)
        few = usage < max(COLLAPSED, 1.5 / codebook) * usable  # above the share of one code, below that of two
        lopsided = perplexity < max(LOPSIDED * codebook, 1.1) * usable
        used = f"of {codebook} codes {usage:.1%} are in use, with a perplexity of {perplexity:.1f}"
        return (
            {"collapse": f"{used}; fewer codes, or a bottleneck that revives them, may help"} if few or lopsided else {}
        )

    # ------------------------------------------------------------------------------------------ balance

    def unmeasured(self, params: Tree) -> Gradients:
        """Before there is a batch."""
        zeros = jnp.zeros_like(last_kernel(params))
        return Gradients(
            step=jnp.int32(-1), weight=jnp.float32(0.0), error=zeros, adversarial=zeros, images=jnp.float32(0.0)
        )

    def begun(self, gradients: Gradients, step: Array) -> Gradients:
        """At the beginning of `step`: its weight is known, its sums are empty. As it is within the step."""
        new = jax.tree.map(jnp.zeros_like, gradients)._replace(step=step, weight=self.balance(gradients))
        return jax.tree.map(lambda a, b: jnp.where(step != gradients.step, a, b), new, gradients)

    def measured(
        self, params: Weights, ctx: Context, z: Array, fooled: Callable[[Array], Array], gradients: Gradients
    ) -> Gradients:
        """With the batch's gradients by the last kernel in the sums: both through one pass of the decoder."""
        params, z = jax.lax.stop_gradient((params["autoencoder"], z))
        made, pull = jax.vjp(
            lambda kernel: self.autoencoder.codec.decode(with_last_kernel(params, kernel), z), last_kernel(params)
        )
        slope = lambda loss: pull(jax.grad(lambda made: jnp.sum(loss(made)))(made))[0]
        error = slope(lambda made: self.apart(ctx, made))
        more = gradients._replace(
            error=gradients.error + error,
            adversarial=gradients.adversarial + slope(fooled),
            images=gradients.images + len(z),
        )
        return jax.lax.stop_gradient(more)

    # ------------------------------------------------------------------------------------------ without an image

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what an image is made from: its latents, or one number for each digit of each code."""
        between = self.autoencoder.bottleneck
        if between.digits:
            return (*self.autoencoder.places, len(between.digits))
        return (*self.autoencoder.grid, between.latents)

    def generate(self, weights: Weights, keys: Array, condition: Condition, options: Tree) -> Array:
        """Images f32[n,H,W,C] in [-1,1], one for each of keys key[n], of latents N(0, 1) or codes drawn uniformly.

        They show what the decoder makes of anything. A model of the latents or codes is another family's.
        """
        return self.decode(weights, self.draw(keys, options), keys, condition, options)

    def draw(self, keys: Array, options: Tree) -> Array:
        """Normal numbers f32[n,h,w,d] of keys key[n]."""
        return rng.normal(keys, self.shape)

    def decode(self, weights: Weights, z: Array, keys: Array, condition: Condition, options: Tree) -> Array:
        """The images f32[n,H,W,C] in [-1,1] of z f32[n,h,w,d]: latents, or codes as `codes.of_normal` reads them.

        The way from one z to another means something where a digit's values are in order, as latents and the digits of
        fsq and lfq are. The numbers of a codebook's codes are not: there a walk jumps from one code to any other.
        """
        bases = self.autoencoder.bottleneck.digits
        return self.autoencoder.decode(weights["autoencoder"], codes.of_normal(z, bases) if bases else z)

    def encode(self, weights: Weights, images: Array, keys: Array, condition: Condition, options: Tree) -> Array:
        """The mean latents f32[n,h,w,d] of images, or what `decode` reads their codes from."""
        found = self.autoencoder.encode(weights["autoencoder"], images, None)
        bases = self.autoencoder.bottleneck.digits
        return codes.to_normal(found, bases) if bases else found

    def sampling(self, section: Mapping[str, Any]) -> Tree:
        """Check the config's `sample` section, of which nothing is this family's own."""
        from_section(SampleSettings, section, "sample")
        return ()


def last_kernel(params: Tree) -> Array:
    """W of an autoencoder's parameters: see `Codec.init`."""
    return params["decoder"]["out"]["conv"]["kernel"]


def with_last_kernel(params: Tree, kernel: Array) -> Tree:
    """The parameters with another W."""
    decoder = params["decoder"]
    out = decoder["out"] | {"conv": decoder["out"]["conv"] | {"kernel": kernel}}
    return params | {"decoder": decoder | {"out": out}}
