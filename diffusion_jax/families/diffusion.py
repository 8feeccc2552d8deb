"""The diffusion family: learn to undo noise, then walk from noise to an image.

Read top to bottom: what a user sets; how it becomes a network, a prediction and an objective; the loss; sampling.

    x_t = alpha(t) x0 + sigma(t) eps          the schedule says how an image drowns in noise
    y   = a(t) x0 + b(t) eps                  the prediction says what the network regresses on
    E w(t) |y - network(x_t, t, label)|^2     the objective draws t and weighs the error
    network -> (x0, eps) -> guided -> solver  the sampler
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax import networks, plugs, rng
from diffusion_jax.diffusion import guidance, time_sampling
from diffusion_jax.diffusion.broadcast import over
from diffusion_jax.diffusion.grids import GRIDS, MAX_STEPS, Grid
from diffusion_jax.diffusion.objectives.denoising import Denoising
from diffusion_jax.diffusion.prediction import PREDICTIONS, Prediction, check_pairing
from diffusion_jax.diffusion.schedule import SCHEDULES
from diffusion_jax.diffusion.solvers import SOLVERS
from diffusion_jax.diffusion.solvers.base import Solver, solve
from diffusion_jax.diffusion.weighting import WEIGHTINGS
from diffusion_jax.errors import UserError, require
from diffusion_jax.settings import from_section
from diffusion_jax.types import Array, Aux, Condition, Context, Denoised, Family, ImageSpec, Player, Tree, Weights

# ---------------------------------------------------------------------------------------------- what a user sets


@dataclass(frozen=True, kw_only=True)
class FamilySettings:
    """The config's `family` section. Each string names a row of a table, with options: `"min_snr(gamma=5)"`.

    Attributes:
      network: from `networks.BACKBONES`.
      schedule: from `diffusion.schedule.SCHEDULES`.
      prediction: from `diffusion.prediction.PREDICTIONS`.
      time_sampling: from `diffusion.time_sampling.TIME_SAMPLINGS`.
      stratified: spread the times of a batch evenly over their density, instead of drawing each on its own.
      weighting: from `diffusion.weighting.WEIGHTINGS`.
      label_dropout: share of training examples whose label is hidden, in [0, 1); guidance needs some.
    """

    network: str = "dit"
    schedule: str = "rectified_flow"
    prediction: str = "velocity"
    time_sampling: str = "logit_normal"
    stratified: bool = True
    weighting: str = "simple"
    label_dropout: float = 0.1

    def __post_init__(self) -> None:
        inside = 0.0 <= self.label_dropout < 1.0
        require(inside, "family.label_dropout", self.label_dropout, "must lie in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """The family's part of the config's `sample` section.

    Attributes:
      solver: from `diffusion.solvers.SOLVERS`.
      grid: from `diffusion.grids.GRIDS`.
      steps: of the solver, at most `grids.MAX_STEPS`.
      guidance: classifier-free guidance weight; 1 is the plain conditional model, 0 the unconditional one.
      clip: keep x0 within [-1, 1] at every step.
    """

    solver: str = "heun"
    grid: str = "uniform"
    steps: int = 20
    guidance: float = 1.0
    clip: bool = True

    def __post_init__(self) -> None:
        require(1 <= self.steps <= MAX_STEPS, "sample.steps", self.steps, f"must lie in [1, {MAX_STEPS}]")
        require(0.0 <= self.guidance < jnp.inf, "sample.guidance", self.guidance, "must be a number from 0 on")


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `generate`: all traced but the solver's kind, so that changing them does not compile again."""

    solver: Solver
    times: Array  # f32[MAX_STEPS + 1], from the grid
    steps: Array  # i32[]
    guidance: Array  # f32[]
    clip: Array  # f32[]: the bound on |x0|, infinity for none


# ---------------------------------------------------------------------------------------------- how it is built


def build(settings: FamilySettings, spec: ImageSpec, precision: str) -> Family:
    """The family for images of `spec`, computing in `precision`.

    Raises:
      UserError: for an unknown row or option, or a schedule and prediction that do not fit together.
    """
    schedule = plugs.build("family.schedule", settings.schedule, SCHEDULES)
    prediction = plugs.build("family.prediction", settings.prediction, PREDICTIONS, schedule=schedule)
    check_pairing("family.prediction", prediction, f"{settings.prediction} with {settings.schedule}")
    model = Model(
        spec=spec,
        network=networks.build("family.network", settings.network, spec, precision),
        prediction=prediction,
        objective=Denoising(
            prediction=prediction,
            time_sampling=plugs.build("family.time_sampling", settings.time_sampling, time_sampling.TIME_SAMPLINGS),
            weighting=plugs.build("family.weighting", settings.weighting, WEIGHTINGS),
        ),
        quantiles=time_sampling.stratified if settings.stratified else time_sampling.independent,
        label_dropout=settings.label_dropout,
    )
    return Family(
        name="diffusion",
        players=(Player(name="denoiser", loss=model.loss),),
        init=lambda key: ({"denoiser": model.network.init(key)}, {}),
        generate=model.generate,
        sampling=model.sampling,
    )


@dataclass(frozen=True, kw_only=True)
class Model:
    """The parts, put together. `null` = num_classes is the label that stands for no label."""

    spec: ImageSpec
    network: networks.Network
    prediction: Prediction
    objective: Denoising
    quantiles: Callable[[Array, Array], Array]
    label_dropout: float

    # ------------------------------------------------------------------------------------------ training

    def loss(self, params: Weights, ctx: Context) -> tuple[Array, Aux]:
        """The denoising loss, averaged over the batch; some labels are hidden, so that guidance can be learned."""
        index = ctx.batch["index"]
        u = self.quantiles(rng.stream(ctx.key, "time"), index)
        keys = rng.example_keys(ctx.key, index)
        label = self.hide_labels(ctx.batch, rng.fold(keys, 0))

        def predict(x: Array, t: Array) -> Array:
            return self.predict(params["denoiser"], x, t, label, dropout=rng.fold(keys, 1))

        losses, _ = self.objective.loss(predict, ctx.batch["image"], u, rng.fold(keys, 2))
        return jnp.mean(losses), Aux(metrics={}, extra=ctx.extra)

    def hide_labels(self, batch: Mapping[str, Array], keys: Array) -> Array | None:
        """Labels i32[B], each replaced by `null` with probability `label_dropout`."""
        if not self.spec.num_classes:
            return None
        return jnp.where(rng.uniform(keys) < self.label_dropout, self.spec.num_classes, batch["label"])

    def predict(self, params: Tree, x: Array, t: Array, label: Array | None, dropout: Array | None = None) -> Array:
        """y f32[B,H,W,C]: the network sees the scaled input and the schedule's label of t, f32[] or f32[B]."""
        time = jnp.atleast_1d(self.prediction.schedule.label(t))
        return self.network.apply(params, over(self.prediction.input_scale(t), x) * x, time, label, dropout)

    # ------------------------------------------------------------------------------------------ sampling

    def generate(self, weights: Weights, keys: Array, condition: Condition, options: Options) -> Array:
        """Images f32[n,H,W,C] in [-1,1], one for each of keys key[n]: solve from noise down to t = 0."""
        schedule = self.prediction.schedule

        def denoise(x: Array, t: Array, label: Array | None) -> Denoised:
            return Denoised(*self.prediction.split(x, self.predict(weights["denoiser"], x, t, label), t))

        if self.spec.num_classes:
            denoiser = guidance.classifier_free(denoise, condition["label"], self.spec.num_classes, options.guidance)
        else:
            denoiser = lambda x, t: denoise(x, t, None)
        denoiser = guidance.clip(denoiser, schedule, options.clip)

        noise = rng.normal(rng.fold(keys, 0), self.spec.shape)
        x = schedule.sigma(options.times[0]) * noise  # the mean, alpha x0, is unknown and next to nothing
        x = solve(denoiser, schedule, options.solver, options.times, options.steps, x, rng.fold(keys, 1))
        return jnp.clip(x, -1.0, 1.0)

    def sampling(self, section: Mapping[str, Any]) -> Options:
        """Check the config's `sample` section and make it options of `generate`."""
        settings = from_section(SampleSettings, section, "sample")
        if settings.guidance != 1.0 and not (self.spec.num_classes and self.label_dropout):
            raise UserError(
                f"sample.guidance = {settings.guidance}: must be 1 for a model without labels or label_dropout."
            )
        grid: Grid = plugs.build("sample.grid", settings.grid, GRIDS)
        return Options(
            solver=plugs.build("sample.solver", settings.solver, SOLVERS),
            times=grid(self.prediction.schedule, jnp.int32(settings.steps)),
            steps=jnp.int32(settings.steps),
            guidance=jnp.float32(settings.guidance),
            clip=jnp.float32(1.0 if settings.clip else jnp.inf),
        )
