"""The diffusion family: learn to undo noise, then walk from noise to an image.

Read top to bottom: what a user sets; how it becomes a network, a prediction and an objective; the losses; sampling,
whose own options stand in `diffusion_sampling`.

    x_t = alpha(t) x0 + sigma(t) eps          the schedule says how an image drowns in noise
    y   = a(t) x0 + b(t) eps                  the prediction says what the network regresses on
    E w(t) |y - network(x_t, t, label)|^2     the objective draws t and weighs the error
    network -> (x0, eps) -> guided -> solver  the sampler

x0 is the image, or what a frozen tokenizer makes of it: latents, standardised (Rombach et al. 2022).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax import networks, plugs, rng, tokenizers
from diffusion_jax.diffusion import editing, guidance
from diffusion_jax.diffusion.broadcast import over
from diffusion_jax.diffusion.editing import Walk
from diffusion_jax.diffusion.likelihood import LIKELIHOODS, Flow, Likelihood
from diffusion_jax.diffusion.objectives import OBJECTIVES, Objective
from diffusion_jax.diffusion.prediction import PREDICTIONS, Prediction, check_pairing
from diffusion_jax.diffusion.schedule import SCHEDULES, Learned, Schedule, logsnr
from diffusion_jax.diffusion.solvers.base import trajectory
from diffusion_jax.diffusion.thresholding import thresholded
from diffusion_jax.diffusion.time_sampling import QUANTILES, TIME_SAMPLINGS, Quantiles, TimeSampling
from diffusion_jax.diffusion.weighting import WEIGHTINGS
from diffusion_jax.errors import require
from diffusion_jax.families.diffusion_classifier import NoisyClassifier
from diffusion_jax.families.diffusion_edits import EDITS
from diffusion_jax.families.diffusion_sampling import (
    AutoguidedSettings,
    Options,
    SampleSettings,
    check_fits,
    options_of,
)
from diffusion_jax.settings import from_section
from diffusion_jax.tokenizers import Stage, Tokenizer
from diffusion_jax.types import (
    Array,
    Aux,
    Batch,
    Condition,
    Context,
    Denoised,
    Family,
    ImageSpec,
    LabelDenoiser,
    Latent,
    Player,
    Tree,
    Weights,
)

# ---------------------------------------------------------------------------------------------- what a user sets


@dataclass(frozen=True, kw_only=True)
class FamilySettings:
    """The config's `family` section. Each string names a row of a table, with options: `"min_snr(gamma=5)"`.

    Attributes:
      network: from `networks.BACKBONES`.
      tokenizer: from `tokenizers.TOKENIZERS`, or "workdir:PATH" of a run that trained one; its vectors are modelled.
      schedule: from `diffusion.schedule.SCHEDULES`, or "learned".
      prediction: from `diffusion.prediction.PREDICTIONS`.
      objective: from `diffusion.objectives.OBJECTIVES`.
      time_sampling: from `diffusion.time_sampling.TIME_SAMPLINGS`, a density of times.
      quantiles: from `diffusion.time_sampling.QUANTILES`, how times are drawn from it.
      weighting: from `diffusion.weighting.WEIGHTINGS`.
      label_dropout: share of training examples whose label is hidden, in [0, 1); guidance needs some.
      classifier: a second network, trained to tell the labels of noisy images, for `sample.classifier`; none where
        empty.
      likelihood: from `diffusion.likelihood.LIKELIHOODS`, how bits per dimension are measured.
    """

    network: str = "dit"
    tokenizer: str = "pixels"
    schedule: str = "rectified_flow"
    prediction: str = "velocity"
    objective: str = "denoising"
    time_sampling: str = "logit_normal"
    quantiles: str = "stratified"
    weighting: str = "simple"
    label_dropout: float = 0.1
    classifier: str = ""
    likelihood: str = "bound"

    def __post_init__(self) -> None:
        inside = 0.0 <= self.label_dropout < 1.0
        require(inside, "family.label_dropout", self.label_dropout, "must lie in [0, 1)")


# ---------------------------------------------------------------------------------------------- how it is built


def build(settings: FamilySettings, spec: ImageSpec, precision: str, tokenizer: Tokenizer | None = None) -> Family:
    """The family for images of `spec`, computing in `precision`; `tokenizer` is the trained one that it is over.

    Raises:
      UserError: for an unknown row or option, or rows that do not fit together.
    """
    stage = Stage(tokenizer=tokenizers.build("family.tokenizer", settings.tokenizer, spec, tokenizer), by_vectors=True)
    spec = replace(spec, size=stage.tokenizer.grid[0], channels=stage.tokenizer.width)
    schedule = plugs.build("family.schedule", settings.schedule, SCHEDULES | {"learned": Learned})
    time_sampling = plugs.build("family.time_sampling", settings.time_sampling, TIME_SAMPLINGS)
    weighting = plugs.build("family.weighting", settings.weighting, WEIGHTINGS)

    def predicting(schedule: Schedule) -> Prediction:
        return plugs.build("family.prediction", settings.prediction, PREDICTIONS, schedule=schedule)

    def objective(prediction: Prediction) -> Objective:
        given = {
            "prediction": prediction,
            "time_sampling": time_sampling,
            "weighting": weighting,
            "levels": spec.levels,
        }
        return plugs.build("family.objective", settings.objective, OBJECTIVES, **given)

    if isinstance(schedule, Learned):
        rule = "a learned schedule needs elbo, whose mean it cannot move"
        require(settings.weighting == "elbo", "family.weighting", settings.weighting, rule)
    if isinstance(schedule, Learned) or plugs.parse("family.objective", settings.objective)[0] == "learned_variance":
        rule = "a learned schedule or variance needs uniform"
        require(settings.time_sampling == "uniform", "family.time_sampling", settings.time_sampling, rule)
    begun = schedule.bind(schedule.init(jax.random.key(0))) if isinstance(schedule, Learned) else schedule
    check_pairing("family.prediction", predicting(begun), f"{settings.prediction} with {settings.schedule}")
    channels = objective(predicting(begun)).channels(spec.channels)
    return Model(
        spec=spec,
        stage=stage,
        network=networks.build("family.network", settings.network, spec, precision, channels),
        schedule=schedule,
        begun=begun,
        predicting=predicting,
        objective=objective,
        time_sampling=time_sampling,
        quantiles=plugs.build("family.quantiles", settings.quantiles, QUANTILES),
        label_dropout=settings.label_dropout,
        likelihood=plugs.build("family.likelihood", settings.likelihood, LIKELIHOODS),
        classifier=_classifier(settings.classifier, spec, precision) if settings.classifier else None,
    ).family()


def _classifier(text: str, spec: ImageSpec, precision: str) -> NoisyClassifier:
    require(spec.num_classes > 0, "family.classifier", text, "needs data with classes")
    network = networks.build("family.classifier", text, spec, precision, spec.num_classes)
    require(not network.augment, "family.classifier", text, "is told of no augmentation; give it augment=0")
    return NoisyClassifier(network=network, num_classes=spec.num_classes)


@dataclass(frozen=True, kw_only=True)
class Model:
    """The parts, put together. `null` = num_classes is the label that stands for no label.

    `spec` is what x0 looks like, of images behind `stage`.
    `begun` is the schedule, or one that a learned schedule may begin as.
    """

    spec: ImageSpec
    stage: Stage
    network: networks.Network
    schedule: Schedule | Learned
    begun: Schedule
    predicting: Callable[[Schedule], Prediction]
    objective: Callable[[Prediction], Objective]
    time_sampling: TimeSampling
    quantiles: Quantiles
    label_dropout: float
    likelihood: Likelihood
    classifier: NoisyClassifier | None = None
    weak: Callable[[Weights], LabelDenoiser] | None = None

    def family(self) -> Family:
        """What everyone else sees of the model."""
        players = [Player(name="denoiser", loss=self.loss, project=self.network.project)]
        if isinstance(self.schedule, Learned):
            players.append(Player(name="schedule", loss=self.schedule_loss))
        if self.classifier:
            project = self.classifier.network.project
            players.append(Player(name="classifier", loss=self.classifier_loss, project=project))
        return Family(
            name="diffusion",
            players=tuple(players),
            init=self.init,
            generate=self.generate,
            sampling=self.sampling,
            nll=self.nll if self.over_pixels else None,
            dequantised=isinstance(self.likelihood, Flow),
            trajectory=self.trajectory,
            latent=Latent(shape=self.spec.shape, draw=self.noise, decode=self.decode, encode=self.encode),
            edits={name: partial(edit, self) for name, edit in EDITS.items()} if self.over_pixels else {},
            denoise=self.bound,
            augment=self.network.augment,
            counted=self.counted,
            first_stage=self.stage.first_stage(self.spec.shape),
            guided_by=lambda weak: replace(self, weak=weak).family(),
        )

    @property
    def over_pixels(self) -> bool:
        """Whether x0 is the image itself."""
        return self.stage.tokenizer.exact and self.stage.by_vectors

    def init(self, key: Array) -> tuple[Weights, Tree]:
        """Parameters by player, and the history of losses that `quantiles` keeps."""
        weights = {"denoiser": self.network.init(key)}
        if isinstance(self.schedule, Learned):
            weights["schedule"] = self.schedule.init(rng.stream(key, "schedule"))
        if self.classifier:
            weights["classifier"] = self.classifier.network.init(rng.stream(key, "classifier"))
        return weights, {"quantiles": self.quantiles.init()}

    def prediction(self, weights: Weights) -> Prediction:
        """The prediction, bound to the schedule, which may have been learned."""
        learned = isinstance(self.schedule, Learned)
        return self.predicting(self.schedule.bind(weights["schedule"]) if learned else self.schedule)

    # ------------------------------------------------------------------------------------------ training

    def loss(self, params: Weights, ctx: Context) -> tuple[Array, Aux]:
        """The objective, averaged over the batch; the quantiles learn where it is large."""
        history = self.quantiles.begun(ctx.extra["quantiles"], ctx.step)
        u, weights, losses, t = self.losses(params, ctx, history)
        history = self.quantiles.update(history, ctx.batch["index"], u, losses)
        loss = jnp.mean(weights * self.balanced(params, losses, t))
        return loss, Aux(metrics={}, extra=ctx.extra | {"quantiles": history})

    def schedule_loss(self, params: Weights, ctx: Context) -> tuple[Array, Aux]:
        """E loss^2, which a learned schedule lowers by making the loss alike at all times (Kingma et al. 2021)."""
        history = self.quantiles.begun(ctx.extra["quantiles"], ctx.step)
        _, weights, losses, _ = self.losses(params, ctx, history)
        return jnp.mean(weights * jnp.square(losses)), Aux(metrics={}, extra=ctx.extra)

    def balanced(self, params: Weights, losses: Array, t: Array) -> Array:
        """L / exp(v) + v f32[B], of losses L at times t, where the network learns their log variance v(t); else L.

        It is least where exp(v) is the mean of L at that time: then all times count alike, however large their losses
        (Kendall et al. 2018; Karras et al. 2024, eq. 14-16).
        """
        if not self.network.log_variance:
            return losses
        v = self.network.log_variance(params["denoiser"], self.prediction(params).schedule.label(t))
        return losses * jnp.exp(-v) + v

    def losses(self, params: Weights, ctx: Context, history: Tree) -> tuple[Array, Array, Array, Array]:
        """Quantiles, weights, losses, times, f32[B] each, `history` being that of the quantiles.

        Some labels are hidden, so that guidance can be learned.
        """
        index, prediction = ctx.batch["index"], self.prediction(params)
        u, weights = self.quantiles.draw(history, rng.stream(ctx.key, "time"), index)
        keys = rng.example_keys(ctx.key, index)
        label = self.hide_labels(ctx.batch, rng.fold(keys, 0))

        def predict(x: Array, t: Array) -> Array:
            augment = ctx.batch.get("augment")
            return self.predict(params["denoiser"], prediction, x, t, label, rng.fold(keys, 1), augment)

        x0 = self.stage.read(ctx.frozen, ctx.batch)
        losses, t = self.objective(prediction).loss(predict, x0, u, rng.fold(keys, 2))
        return u, weights, losses, t

    def hide_labels(self, batch: Mapping[str, Array], keys: Array) -> Array | None:
        """Labels i32[B], each replaced by `null` with probability `label_dropout`."""
        if not self.spec.num_classes:
            return None
        return jnp.where(rng.uniform(keys) < self.label_dropout, self.spec.num_classes, batch["label"])

    def predict(
        self,
        params: Tree,
        prediction: Prediction,
        x: Array,
        t: Array,
        label: Array | None,
        dropout: Array | None = None,
        augment: Array | None = None,
    ) -> Array:
        """y f32[B,H,W,C]: the network sees the scaled input and the schedule's label of t, f32[] or f32[B]."""
        time = jnp.atleast_1d(prediction.schedule.label(t))
        return self.network.apply(params, over(prediction.input_scale(t), x) * x, time, label, dropout, augment)

    def classifier_loss(self, params: Weights, ctx: Context) -> tuple[Array, Aux]:
        """What the classifier of noisy images minimises."""
        image, label = self.stage.read(ctx.frozen, ctx.batch), ctx.batch["label"]
        keys, prediction = rng.example_keys(ctx.key, ctx.batch["index"]), self.prediction(params)
        losses = self.classifier.loss(params["classifier"], prediction, self.time_sampling, image, label, keys)
        return jnp.mean(losses), Aux(metrics={}, extra=ctx.extra)

    # ------------------------------------------------------------------------------------------ sampling

    def prepared(self, weights: Weights) -> Weights:
        """The same weights, in the form in which a loop uses them."""
        ready = {"denoiser": self.network.prepare(weights["denoiser"])}
        if self.classifier:
            ready["classifier"] = self.classifier.network.prepare(weights["classifier"])
        return {**weights, **ready}

    def bound(self, weights: Weights) -> LabelDenoiser:
        """The plain model under labels that are given with each point."""
        weights = self.prepared(weights)
        return lambda x, t, label: self.denoise(weights, x, t, label)

    def counted(self, note: Callable[[int], None]) -> Family:
        """The same family, whose network says at each of its runs how many images it was given."""

        def apply(params: Tree, x: Array, *others: Array | None) -> Array:
            jax.debug.callback(partial(note, len(x)))
            return self.network.apply(params, x, *others)

        return replace(self, network=replace(self.network, apply=apply)).family()

    def denoise(self, weights: Weights, x: Array, t: Array, label: Array | None) -> Denoised:
        """What the plain model makes of x under labels i32[n]."""
        prediction = self.prediction(weights)
        y = self.predict(weights["denoiser"], prediction, x, t, label)
        return self.objective(prediction).denoised(x, y, t)

    def denoiser(self, weights: Weights, condition: Condition, options: Options) -> guidance.Guided:
        """The model, guided away from itself without labels, then from a worse one, and kept in range."""
        schedule, label = self.prediction(weights).schedule, condition.get("label")
        guided = guidance.as_guided(lambda x, t: self.denoise(weights, x, t, label))
        if label is not None:
            by_label = lambda x, t, label: self.denoise(weights, x, t, label)
            pair = guidance.with_and_without_label(by_label, label, self.spec.num_classes)
            guided = guidance.guide(pair, schedule, options.guidance, options.rules)
        if self.weak:
            weak = self.weak(weights["weak"])
            pair = guidance.strong_and_weak(guided, lambda x, t: weak(x, t, label))
            guided = guidance.guide(pair, schedule, options.autoguidance, options.autoguidance_rules)
        if self.classifier:
            follow = partial(self.classifier.guide, weights["classifier"], self.prediction(weights), label)
            guided = guided.then(partial(follow, options.classifier))
        return guided.then(lambda denoise: thresholded(denoise, schedule, options.threshold))

    def generate(self, weights: Weights, keys: Array, condition: Condition, options: Options) -> Array:
        """Images f32[n,H,W,C] in [-1,1], one for each of keys key[n]: solve from noise down to t = 0."""
        return self.decode(weights, self.noise(keys, options), keys, condition, options)

    def decode(self, weights: Weights, noise: Array, keys: Array, condition: Condition, options: Options) -> Array:
        """The images f32[n,H,W,C] in [-1,1] that noise f32[n,H,W,C] leads to; keys key[n] for the solver."""
        walk = self.walk(weights, condition, options)
        return self.stage.decode(weights, editing.decode(walk, noise, rng.fold(keys, 1)))

    def encode(self, weights: Weights, image: Array, keys: Array, condition: Condition, options: Options) -> Array:
        """The noise f32[n,H,W,C] that `decode` leads to `image`, by a solver of an ODE, which asks for no keys."""
        return editing.encode(self.walk(weights, condition, options), self.stage.read(weights, {"image": image}), keys)

    def trajectory(self, weights: Weights, keys: Array, condition: Condition, options: Options, steps: int) -> Array:
        """All stops on the way, f32[n,steps + 1,H,W,C]; `steps` are those of `options`, as a Python number."""
        walk = self.walk(weights, condition, options)._replace(steps=steps)
        stops = trajectory(*walk, editing.first_stop(walk, self.noise(keys, options)), rng.fold(keys, 1))
        if not self.over_pixels:
            stops = jax.lax.map(partial(self.stage.decode, weights), stops)
        return jnp.swapaxes(stops, 0, 1)

    def walk(self, weights: Weights, condition: Condition, options: Options) -> Walk:
        """The way from noise to an image under `condition`."""
        weights = self.prepared(weights)
        denoiser, schedule = self.denoiser(weights, condition, options), self.prediction(weights).schedule
        solver = guidance.carried(options.solver, denoiser, jnp.zeros((1, *self.spec.shape)))
        return Walk(denoiser, schedule, solver, self.times(schedule, options), options.steps)

    def times(self, schedule: Schedule, options: Options) -> Array:
        """The grid's stops; where it is one of log-SNRs, they were looked up on `begun`, and now are on `schedule`."""
        if not isinstance(self.schedule, Learned):
            return options.times
        again = schedule.time(logsnr(self.begun, options.times))
        return jnp.where(options.of_noise & (options.times > 0.0), again, options.times)

    def noise(self, keys: Array, options: Options) -> Array:
        """The noise f32[n,H,W,C], of unit variance at temperature 1, that images of keys key[n] begin as."""
        return options.temperature * rng.normal(rng.fold(keys, 0), self.spec.shape)

    def nll(self, weights: Weights, batch: Batch, key: Array) -> Array:
        """Bits per dimension f32[B] of the batch's images under their labels, without guidance or threshold."""
        label, weights = batch["label"] if self.spec.num_classes else None, self.prepared(weights)
        denoise = lambda x, t: self.denoise(weights, x, t, label)
        keys = rng.example_keys(key, batch["index"])
        return self.likelihood(denoise, self.prediction(weights).schedule, batch["image"], keys, self.spec.levels)

    def sampling(self, section: Mapping[str, Any]) -> Options:
        """Check the config's `sample` section and make it options of `generate`."""
        settings = from_section(AutoguidedSettings if self.weak else SampleSettings, section, "sample")
        check_fits(
            settings,
            labels=bool(self.spec.num_classes and self.label_dropout),
            classifier=self.classifier is not None,
            bounded=not self.stage.measured,
        )
        return options_of(settings, self.begun)
