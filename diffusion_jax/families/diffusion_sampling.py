"""What a user may ask of sampling: the config's `sample` section of the diffusion family, and what becomes of it."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from diffusion_jax import plugs
from diffusion_jax.diffusion import guidance
from diffusion_jax.diffusion.grids import GRIDS, MAX_STEPS
from diffusion_jax.diffusion.schedule import Schedule
from diffusion_jax.diffusion.solvers import DDIM, SOLVERS
from diffusion_jax.diffusion.solvers.base import Solver
from diffusion_jax.diffusion.thresholding import THRESHOLDS, Threshold
from diffusion_jax.errors import require
from diffusion_jax.types import Array


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """The family's part of the config's `sample` section.

    Attributes:
      solver: from `diffusion.solvers.SOLVERS`.
      grid: from `diffusion.grids.GRIDS`.
      steps: of the solver, at most `grids.MAX_STEPS`.
      guidance: weight of the conditional model against the other; 1 is the conditional one alone, 0 the other.
      rules: from `diffusion.guidance.GUIDANCE_RULES`, joined by "+"; they change what `guidance` does.
      classifier: weight of the gradient of `family.classifier`; 0 for none.
      threshold: from `diffusion.thresholding.THRESHOLDS`, what keeps x0 in range at every step.
      temperature: standard deviation of the noise at the start, over the schedule's own; a little above 1 gives back
        variety that a small network loses.
    """

    solver: str = "heun"
    grid: str = "uniform"
    steps: int = 20
    guidance: float = 1.0
    rules: str = ""
    classifier: float = 0.0
    threshold: str = "static"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        require(1 <= self.steps <= MAX_STEPS, "sample.steps", self.steps, f"must lie in [1, {MAX_STEPS}]")
        for name in ("guidance", "classifier"):
            weight = getattr(self, name)
            require(0.0 <= weight < jnp.inf, f"sample.{name}", weight, "must be a number from 0 on")
        require(0.0 < self.temperature < jnp.inf, "sample.temperature", self.temperature, "must be positive")


@dataclass(frozen=True, kw_only=True)
class AutoguidedSettings(SampleSettings):
    """The same for a model beside a worse one, which a command names.

    Attributes:
      autoguidance: weight of the model, as `guidance` made it, against the worse one; 1 is the model alone.
      autoguidance_rules: as `rules`, of what `autoguidance` does.
    """

    autoguidance: float = 1.0
    autoguidance_rules: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        fine = 0.0 <= self.autoguidance < jnp.inf
        require(fine, "sample.autoguidance", self.autoguidance, "must be a number from 0 on")


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `generate`: all traced but the kinds of solver, rules and threshold: new numbers compile nothing."""

    solver: Solver
    times: Array  # f32[MAX_STEPS + 1], from the grid
    of_noise: Array  # bool[]: the times stand for log-SNRs
    steps: Array  # i32[]
    guidance: Array  # f32[]
    rules: tuple[guidance.Rule, ...]
    autoguidance: Array  # f32[]
    autoguidance_rules: tuple[guidance.Rule, ...]
    classifier: Array  # f32[]
    threshold: Threshold
    temperature: Array  # f32[]


def check_fits(settings: SampleSettings, *, labels: bool, classifier: bool, bounded: bool) -> None:
    """Raise `UserError` where the model lacks what is asked for.

    Args:
      settings: of the config.
      labels: whether the model knows images with and without labels.
      classifier: whether it has a second network that tells labels.
      bounded: whether x0 lies in [-1, 1], as pixels do.
    """
    rule = "must be 1 for a model without labels or label_dropout"
    require(settings.guidance == 1.0 or labels, "sample.guidance", settings.guidance, rule)
    rule = "must be empty for a model without labels or label_dropout"
    require(not settings.rules or labels, "sample.rules", settings.rules, rule)
    rule = "must be 0 for a model without family.classifier"
    require(settings.classifier == 0.0 or classifier, "sample.classifier", settings.classifier, rule)
    fine = bounded or plugs.parse("sample.threshold", settings.threshold)[0] == "none"
    require(fine, "sample.threshold", settings.threshold, "must be none: latents have no range")


def options_of(settings: SampleSettings, schedule: Schedule) -> Options:
    """The options of `generate`; the grid's stops are times of `schedule`.

    Raises:
      UserError: for an unknown row, or rows that do not fit together.
    """
    grid = plugs.build("sample.grid", settings.grid, GRIDS)
    rule = f"the grid {settings.grid} has {grid.steps} steps; set as many"
    require(grid.steps in (None, settings.steps), "sample.steps", settings.steps, rule)
    rule = f"the grid {settings.grid} has no more than {grid.most} stops"
    require(settings.steps <= grid.most, "sample.steps", settings.steps, rule)
    solver, weak = plugs.build("sample.solver", settings.solver, SOLVERS), isinstance(settings, AutoguidedSettings)
    return Options(
        solver=solver,
        times=grid(schedule, jnp.int32(settings.steps)),
        of_noise=jnp.bool_(grid.of_noise),
        steps=jnp.int32(settings.steps),
        guidance=jnp.float32(settings.guidance),
        rules=_rules("sample.rules", settings.rules, solver),
        autoguidance=jnp.float32(settings.autoguidance if weak else 1.0),
        autoguidance_rules=_rules("sample.autoguidance_rules", settings.autoguidance_rules if weak else "", solver),
        classifier=jnp.float32(settings.classifier),
        threshold=plugs.build("sample.threshold", settings.threshold, THRESHOLDS),
        temperature=jnp.float32(settings.temperature),
    )


def _rules(field: str, text: str, solver: Solver) -> tuple[guidance.Rule, ...]:
    """The rules of guidance that `text` names."""
    rules = plugs.build_all(field, text, guidance.GUIDANCE_RULES)
    plain_ddim = isinstance(solver, DDIM) and solver.eta == 0.0
    fine = plain_ddim or not any(isinstance(rule, guidance.CFGPlusPlus) for rule in rules)
    require(fine, field, text, "cfg_pp is a method for the solver ddim with eta = 0")
    return rules
