"""The GAN family: one network makes images of noise, another tells them from real ones, and each learns by the other.

Read top to bottom: what a user sets; how it becomes two networks and a game; the two losses; sampling.

    x' = G(z, y),   z ~ N(0, 1)                               the generator makes an image of class y
    D(T(x), y)                                                the discriminator sees it, and a real x, through changes T
    discriminator:  E l_D(D(T(x)), D(T(x'))) + penalties      moves first
    generator:      E l_G(D(T(x)), D(T(x')))                  then moves against the new D

Both losses see the same z, so that the compiler runs G once for the two. What T does to a real image it does to the
generated one beside it, too: a pair differs by what G has done. Penalties are on the slope of D(T(x)) by x.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax import plugs, rng, tree
from diffusion_jax.adversarial import augment, spectral
from diffusion_jax.adversarial.augment import AUGMENTATIONS, Augmentation
from diffusion_jax.adversarial.losses import LOSSES, Loss
from diffusion_jax.adversarial.regularisers import REGULARISERS, Critic, Regulariser, lazily
from diffusion_jax.errors import require
from diffusion_jax.networks import gan as networks
from diffusion_jax.settings import from_section
from diffusion_jax.types import Array, Aux, Condition, Context, Family, ImageSpec, Latent, Player, Tree, Weights

# ---------------------------------------------------------------------------------------------- what a user sets

NORMALISED = {"none": (), "discriminator": ("discriminator",), "both": ("discriminator", "generator")}
"""`spectral_norm` -> the players whose kernels are normalised."""


@dataclass(frozen=True, kw_only=True)
class FamilySettings:
    """The config's `family` section. Each string names a row of a table, with options: `"r1(gamma=10.0,every=16)"`.

    Attributes:
      generator: from `networks.gan.GENERATORS`.
      discriminator: from `networks.gan.DISCRIMINATORS`.
      loss: from `adversarial.losses.LOSSES`.
      regularisers: from `adversarial.regularisers.REGULARISERS`, joined by "+"; none where empty.
      spectral_norm: whose kernels have spectral norm 1: "none", "discriminator" or "both".
      augmentation: from `adversarial.augment.AUGMENTATIONS`, what the discriminator sees images through; nothing where
        empty.
      generator_every: updates of the discriminator for one of the generator; `train.steps` counts the former.
      discriminator_rate: the discriminator's learning rate over the generator's (Heusel et al. 2017).
    """

    generator: str = "resnet"
    discriminator: str = "resnet"
    loss: str = "relativistic"
    regularisers: str = "r1 + r2"
    spectral_norm: str = "none"
    augmentation: str = ""
    generator_every: int = 1
    discriminator_rate: float = 1.0

    def __post_init__(self) -> None:
        require(self.generator_every >= 1, "family.generator_every", self.generator_every, "must be at least 1")
        positive = 0.0 < self.discriminator_rate < jnp.inf
        require(positive, "family.discriminator_rate", self.discriminator_rate, "must be positive")
        rule = f"must be one of {', '.join(NORMALISED)}"
        require(self.spectral_norm in NORMALISED, "family.spectral_norm", self.spectral_norm, rule)


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """The family's part of the config's `sample` section.

    Attributes:
      truncation: from `TRUNCATIONS`, how far z or the style may go from what is usual: less variety, better images.
      temperature: standard deviation of z, over the one in training; above 1 for more variety.
    """

    truncation: str = "none"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        require(0.0 < self.temperature < jnp.inf, "sample.temperature", self.temperature, "must be positive")


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class NoTruncation:
    """z is standard normal, and the style what the mapping makes of it."""

    def draw(self, keys: Array, latent: int) -> Array:
        """Z f32[n,latent] of keys key[n]."""
        return rng.normal(keys, (latent,))

    def style(self, w: Array, mean: Callable[[], Array]) -> Array:
        """Styles w f32[n,...] as the synthesis is given them; mean() is f32[1,...]."""
        return w


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class NormalTruncation(NoTruncation):
    """No number of z is beyond `bound`: one that is would be drawn again (Brock et al. 2019, section 3.1).

    A temperature scales z, and with it the bound.
    """

    bound: float = 2.0

    def __post_init__(self) -> None:
        if isinstance(self.bound, float) and not self.bound > 0.0:
            raise ValueError(f"bound must be positive, not {self.bound}")

    def draw(self, keys: Array, latent: int) -> Array:
        """Z f32[n,latent] of keys key[n], in [-bound, bound]."""
        return rng.draw(keys, lambda key: jax.random.truncated_normal(key, -self.bound, self.bound, (latent,)))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class StyleTruncation(NoTruncation):
    """w' = mean + psi (w - mean), for a generator with a mapping (Karras et al. 2019, appendix B)."""

    psi: float = 0.7

    def __post_init__(self) -> None:
        if isinstance(self.psi, float) and not -1.0 <= self.psi <= 1.0:
            raise ValueError(f"psi must lie in [-1, 1], not {self.psi}")

    def style(self, w: Array, mean: Callable[[], Array]) -> Array:
        """Styles f32[n,...] from w f32[n,...]; mean() is f32[1,...]."""
        centre = mean()
        return centre + self.psi * (w - centre)


TRUNCATIONS = {"none": NoTruncation, "normal": NormalTruncation, "style": StyleTruncation}

MEAN_STYLES = 1024
"""How many styles the mean style is the mean of."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `generate`: the temperature and how far truncation goes are traced, its kind is not."""

    truncation: NoTruncation
    temperature: Array  # f32[]


# ---------------------------------------------------------------------------------------------- how it is built


def build(settings: FamilySettings, spec: ImageSpec, precision: str) -> Family:
    """The family for images of `spec`, computing in `precision`; class-conditional where `spec` has classes.

    Raises:
      UserError: for an unknown row or option, or networks that do not fit `spec` or the spectral normalisation.
    """
    unbounded = plugs.parse("family.loss", settings.loss)[0] == "wasserstein"
    bounded = not unbounded or settings.regularisers or settings.spectral_norm != "none"
    rule = "needs a discriminator that is held back: a penalty such as gradient_penalty, or spectral_norm"
    require(bool(bounded), "family.loss", settings.loss, rule)
    generator = networks.build_generator("family.generator", settings.generator, spec, precision)
    discriminator = networks.build_discriminator("family.discriminator", settings.discriminator, spec, precision)
    for name, network in (("discriminator", discriminator), ("generator", generator)):
        fits = not network.unfit or name not in NORMALISED[settings.spectral_norm]
        require(fits, "family.spectral_norm", settings.spectral_norm, f"not for this {name}: {network.unfit}")
    return Model(
        spec=spec,
        generator=generator,
        discriminator=discriminator,
        loss=plugs.build("family.loss", settings.loss, LOSSES),
        regularisers=plugs.build_all("family.regularisers", settings.regularisers, REGULARISERS),
        normalised=NORMALISED[settings.spectral_norm],
        augmentation=_augmentation(settings.augmentation),
        generator_every=settings.generator_every,
        discriminator_rate=settings.discriminator_rate,
    ).family()


def _augmentation(text: str) -> Augmentation | None:
    return plugs.build("family.augmentation", text, AUGMENTATIONS) if text else None


class Round(NamedTuple):
    """What both players look at: real and generated images f32[n,H,W,C], one key an image, and D(T(x)) of any x."""

    real: Array
    fake: Array
    keys: Array
    critic: Critic


@dataclass(frozen=True, kw_only=True)
class Model:
    """The parts, put together. `normalised` names the players with spectral normalisation."""

    spec: ImageSpec
    generator: networks.Generator
    discriminator: networks.Discriminator
    loss: Loss
    regularisers: tuple[Regulariser, ...]
    normalised: tuple[str, ...]
    augmentation: Augmentation | None
    generator_every: int
    discriminator_rate: float

    def family(self) -> Family:
        """What everyone else sees of the model."""
        discriminator = Player(name="discriminator", loss=self.discriminator_loss, rate=self.discriminator_rate)
        generator = Player(name="generator", loss=self.generator_loss, every=self.generator_every)
        return Family(
            name="gan",
            players=(discriminator, generator),
            init=self.init,
            generate=self.generate,
            sampling=self.sampling,
            latent=Latent(shape=(self.generator.latent,), draw=self.draw, decode=self.decode),
        )

    def init(self, key: Array) -> tuple[Weights, Tree]:
        """Parameters by player, and what changes without gradient: see `begun`."""
        weights = {
            name: network.init(rng.stream(key, name))
            for name, network in (("discriminator", self.discriminator), ("generator", self.generator))
        }
        vectors = {name: spectral.begin(weights[name], rng.stream(key, f"{name} spectral")) for name in self.normalised}
        control = {"augmentation": augment.begin(self.augmentation)} if self.augmentation else {}
        return weights, {"step": jnp.int32(-1), "spectral": vectors} | control

    # ------------------------------------------------------------------------------------------ training

    def discriminator_loss(self, params: Weights, ctx: Context) -> tuple[Array, Aux]:
        """E l_D(D(T(x)), D(T(x'))) + penalties; beside it, what changes without gradient goes on by a step."""
        extra = self.begun(params, ctx)
        real, fake, keys, critic = self.round(params, ctx, extra)
        on_real, on_fake = critic(real), critic(fake)
        losses = self.loss.discriminator(on_real, on_fake)
        metrics = {"real": jnp.mean(on_real), "fake": jnp.mean(on_fake)}
        if self.regularisers:
            penalties = sum(
                lazily(penalise.every, ctx.step, lambda penalise=penalise: penalise(critic, real, fake, keys))
                for penalise in self.regularisers
            )
            losses, metrics = losses + penalties, metrics | {"penalty": jnp.mean(penalties)}
        if self.augmentation:
            control = augment.observe(extra["augmentation"], jax.lax.stop_gradient(self.loss.margin(on_real, on_fake)))
            extra = extra | {"augmentation": control}
            metrics = metrics | {"p": control.p, "r_t": control.overfitting}
        return jnp.mean(losses), Aux(metrics=metrics, extra=extra)

    def generator_loss(self, params: Weights, ctx: Context) -> tuple[Array, Aux]:
        """E l_G(D(T(x)), D(T(x')))."""
        real, fake, _, critic = self.round(params, ctx, ctx.extra)
        losses = self.loss.generator(critic(real), critic(fake))
        return jnp.mean(losses), Aux(metrics={}, extra=ctx.extra)

    def round(self, params: Weights, ctx: Context, extra: Tree) -> Round:
        """Draw one generated image beside each real one, of its class. By the common key: the same for both players."""
        keys = rng.example_keys(ctx.common, ctx.batch["index"])
        label = ctx.batch["label"] if self.spec.num_classes else None
        judge = self.in_training("discriminator", params, extra)

        def critic(x: Array) -> Array:
            if self.augmentation:
                x = self.augmentation(x, rng.fold(keys, 2), extra["augmentation"].p)
            return self.discriminator.apply(judge, x, label)

        z = rng.normal(rng.fold(keys, 0), (self.generator.latent,))
        fake = self.generator.apply(self.in_training("generator", params, extra), z, label, rng.fold(keys, 1))
        return Round(real=ctx.batch["image"], fake=fake, keys=rng.fold(keys, 3), critic=critic)

    def begun(self, params: Weights, ctx: Context) -> Tree:
        """The state `extra` as this step uses it: singular vectors after one more round, p of the augmentation moved.

        Only a step's first microbatch moves them, so that the others see the same; `step` says which step they are of.
        """
        spectra = ctx.extra["spectral"]
        new = {"step": ctx.step, "spectral": {name: spectral.advance(params[name], spectra[name]) for name in spectra}}
        if self.augmentation:
            new["augmentation"] = self.augmentation.adapt(ctx.extra["augmentation"], ctx.step)
        return jax.lax.stop_gradient(tree.where(ctx.extra["step"] != ctx.step, new, ctx.extra))

    def in_training(self, name: str, params: Weights, extra: Tree) -> Tree:
        """A player's weights, over their spectral norms where those are asked for."""
        return spectral.normalise(params[name], extra["spectral"][name]) if name in self.normalised else params[name]

    # ------------------------------------------------------------------------------------------ sampling

    def generate(self, weights: Weights, keys: Array, condition: Condition, options: Options) -> Array:
        """Images f32[n,H,W,C] in [-1,1], one for each of keys key[n]: G(z)."""
        return self.decode(weights, self.draw(keys, options), keys, condition, options)

    def draw(self, keys: Array, options: Options) -> Array:
        """Z f32[n,latent] of keys key[n], times the temperature."""
        return options.temperature * options.truncation.draw(rng.fold(keys, 0), self.generator.latent)

    def decode(self, weights: Weights, z: Array, keys: Array, condition: Condition, options: Options) -> Array:
        """The images f32[n,H,W,C] in [-1,1] of z f32[n,latent]; `keys` are of what noise the generator adds itself.

        Spectral norms are exact here: averaged weights have others than the last ones, for which vectors are kept.
        """
        params, label, noise = weights["generator"], condition.get("label"), rng.fold(keys, 1)
        if "generator" in self.normalised:
            params = spectral.exactly(params)
        if self.generator.style:
            w = self.generator.style.mapping(params, z, label)
            images = self.generator.style.synthesis(
                params, options.truncation.style(w, lambda: self.mean_style(params)), noise
            )
        else:
            images = self.generator.apply(params, z, label, noise)
        return jnp.clip(images, -1.0, 1.0)

    def mean_style(self, params: Tree) -> Array:
        """The mean f32[1,...] of the styles of fixed z, over all classes in turn."""
        z = jax.random.normal(jax.random.key(0), (MEAN_STYLES, self.generator.latent))
        label = jnp.arange(MEAN_STYLES) % self.spec.num_classes if self.spec.num_classes else None
        return jnp.mean(self.generator.style.mapping(params, z, label), axis=0, keepdims=True)

    def sampling(self, section: Mapping[str, Any]) -> Options:
        """Check the config's `sample` section and make it options of `generate`."""
        settings = from_section(SampleSettings, section, "sample")
        truncation = plugs.build("sample.truncation", settings.truncation, TRUNCATIONS)
        possible = self.generator.style or not isinstance(truncation, StyleTruncation)
        require(
            bool(possible), "sample.truncation", settings.truncation, "needs a generator with a mapping; try normal"
        )
        scaled = settings.temperature == 1.0 or not self.generator.style
        rule = "must be 1 for a generator with a mapping, which brings z to one length; try truncation=style(psi=...)"
        require(scaled, "sample.temperature", settings.temperature, rule)
        return Options(truncation=truncation, temperature=jnp.float32(settings.temperature))
