"""The settings that every config has, and how a config's section becomes frozen, checked settings.

A config is a `ml_collections.ConfigDict` with one section per dataclass below, plus `family` and the family's own part
of `sample`, which the family checks. Every field of a section must be read by something: an unknown one is an error.
"""

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, TypeVar

from diffusion_jax import plugs
from diffusion_jax.errors import UserError, require

S = TypeVar("S")


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Which images.

    Attributes:
      name: "digits", "digits_canvas", "stacked_digits", "tfds:NAME" or "folder:PATH".
      image_size: side in pixels, to which images are resized (shorter side) and cropped (centre); 0 for their own.
      train_split: TFDS split string of the training images.
      held_out_split: TFDS split string of the images that only evaluation sees.
      data_dir: where TFDS finds its data; its own default where empty.
      labels: whether labels are read, where the data has some; without them a model is unconditional.
      flip: mirror training images left to right with probability 1/2.
      augment: from `data.augment.AUGMENTATIONS`, changes of training images of which the network is told; none where
        empty.
      device_megabytes: data sets up to this size live on the device, larger ones stream through grain.
    """

    name: str = "digits"
    image_size: int = 0
    train_split: str = "train"
    held_out_split: str = "test"
    data_dir: str = ""
    labels: bool = True
    flip: bool = False
    augment: str = ""
    device_megabytes: int = 1024

    def __post_init__(self) -> None:
        require(self.image_size >= 0, "data.image_size", self.image_size, "must be 0 (as it is) or a number of pixels")
        require(self.device_megabytes >= 0, "data.device_megabytes", self.device_megabytes, "must not be negative")


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How the parameters are trained.

    Attributes:
      steps: updates in all.
      batch_size: examples an update, over all devices and microbatches.
      accumulate: microbatches an update; divides the batch size.
      optimizer: an optax optimizer by name, `"adamw(b2=0.99)"`.
      learning_rate: its peak.
      learning_rate_schedule: an optax schedule by name; steps and peak are filled in where it does not give them.
      clip_norm: gradients of a larger global norm are scaled down to it; 0 for never.
      ema: averaging profiles, name -> rule.
      max_skipped: stop after so many updates in a row that were not finite.
      log_every: steps between two log lines, and the most steps in one dispatch.
    """

    steps: int = 10_000
    batch_size: int = 64
    accumulate: int = 1
    optimizer: str = "adamw(b2=0.99,weight_decay=0.0)"
    learning_rate: float = 1e-3
    learning_rate_schedule: str = "constant_schedule"
    clip_norm: float = 1.0
    ema: dict = field(default_factory=lambda: {"main": "warmup(decay=0.999)"})
    max_skipped: int = 20
    log_every: int = 100

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "max_skipped", "log_every"):
            require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "must be at least 1")
        require(
            self.batch_size % self.accumulate == 0,
            "train.accumulate",
            self.accumulate,
            f"must divide train.batch_size = {self.batch_size}",
        )
        require(0.0 < self.learning_rate < math.inf, "train.learning_rate", self.learning_rate, "must be positive")
        require(0.0 <= self.clip_norm < math.inf, "train.clip_norm", self.clip_norm, "must be 0 (off) or positive")
        require("none" not in self.ema, "train.ema.none", self.ema.get("none"), "'none' means the plain parameters")


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """When to save and what to keep: the newest `keep`, and every one at a multiple of `keep_every` steps (0: none)."""

    every: int = 1000
    keep: int = 2
    keep_every: int = 0

    def __post_init__(self) -> None:
        require(self.every >= 1, "checkpoint.every", self.every, "must be at least 1")
        require(self.keep >= 1, "checkpoint.keep", self.keep, "must be at least 1")
        require(self.keep_every >= 0, "checkpoint.keep_every", self.keep_every, "must be 0 (off) or a number of steps")
        rule = f"must be a multiple of checkpoint.every = {self.every}, or nothing would be kept"
        require(self.keep_every % self.every == 0, "checkpoint.keep_every", self.keep_every, rule)


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """The part of `sample` that all families share; the rest belongs to the family.

    Attributes:
      ema: the averaging profile whose weights make samples; "none" for the plain parameters.
      batch_size: images made at once.
      every: steps between two grids in WORKDIR/samples; 0 for one at the end only.
    """

    ema: str = "main"
    batch_size: int = 250
    every: int = 0

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, "sample.batch_size", self.batch_size, "must be at least 1")
        require(self.every >= 0, "sample.every", self.every, "must be 0 (off) or a number of steps")


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """How a run is judged.

    Attributes:
      every: steps between two light evaluations; 0 for none.
      light_samples: images of a light evaluation.
      num_samples: images of the full one, at the end.
      bootstrap: resamplings behind each interval.
      max_real: at most so many real images of either part are looked at.
    """

    every: int = 0
    light_samples: int = 250
    num_samples: int = 2000
    bootstrap: int = 200
    max_real: int = 10_000

    def __post_init__(self) -> None:
        require(self.every >= 0, "evaluate.every", self.every, "must be 0 (off) or a number of steps")
        for name, least in (("light_samples", 50), ("num_samples", 50), ("bootstrap", 10), ("max_real", 50)):
            require(getattr(self, name) >= least, f"evaluate.{name}", getattr(self, name), f"must be at least {least}")


@dataclass(frozen=True, kw_only=True)
class MeshSettings:
    """How devices are arranged.

    Attributes:
      data: copies of the model, each with its share of the batch; -1 for all devices that are left.
      fsdp: devices over which parameters, optimizer state and batch are cut.
      tensor: devices over which the wide matrices are cut.
      rules: (regular expression over parameter paths, axes) pairs that come before the default ones.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    rules: tuple = ()

    def __post_init__(self) -> None:
        require(
            self.data == -1 or self.data >= 1, "mesh.data", self.data, "must be -1 (all that are left) or at least 1"
        )
        require(self.fsdp >= 1, "mesh.fsdp", self.fsdp, "must be at least 1")
        require(self.tensor >= 1, "mesh.tensor", self.tensor, "must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A whole config, checked. `family` and `sampling` are the sections that the family itself checks."""

    seed: int = 0
    precision: str = "float32"
    data: DataSettings = field(default_factory=DataSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    sample: SampleSettings = field(default_factory=SampleSettings)
    evaluate: EvaluateSettings = field(default_factory=EvaluateSettings)
    mesh: MeshSettings = field(default_factory=MeshSettings)
    family: Mapping[str, Any] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**31, "seed", self.seed, "must lie in [0, 2^31)")
        choices = ("float32", "bfloat16")
        require(self.precision in choices, "precision", self.precision, f"must be one of {', '.join(choices)}")
        profiles = ("none", *self.train.ema)
        require(self.sample.ema in profiles, "sample.ema", self.sample.ema, f"must be one of {', '.join(profiles)}")


SECTIONS = {
    "data": DataSettings,
    "train": TrainSettings,
    "checkpoint": CheckpointSettings,
    "evaluate": EvaluateSettings,
    "mesh": MeshSettings,
}


def from_section(cls: type[S], section: Mapping[str, Any], path: str) -> S:
    """Build the dataclass `cls` from a config section; unknown fields and wrong types raise `UserError`."""
    known = {f.name: f for f in fields(cls)}
    for key in section:
        if key not in known:
            raise UserError(f"{path}.{key} = {section[key]!r}: nothing reads this field; {plugs.suggest(key, known)}.")
    for name, f in known.items():
        if name not in section and f.default is MISSING and f.default_factory is MISSING:
            raise UserError(f"{path} lacks the field {name!r}.")
    return cls(**{key: plugs.coerce(f"{path}.{key}", section[key], known[key].type) for key in section})


def from_config(config: Mapping[str, Any]) -> Settings:
    """Check a whole config, nested plain dictionaries.

    Raises:
      UserError: naming the field, its value and what would be right.
    """
    top = {"seed": int, "precision": str, "sample": dict, "family": dict, **dict.fromkeys(SECTIONS, dict)}
    for key, value in config.items():
        if key not in top:
            raise UserError(f"{key} = {value!r}: nothing reads this field; {plugs.suggest(key, top)}.")
        plugs.coerce(key, value, top[key])
    shared = {f.name for f in fields(SampleSettings)}
    sample = config.get("sample", {})
    return Settings(
        **{key: config[key] for key in ("seed", "precision", "family") if key in config},
        **{key: from_section(cls, config.get(key, {}), key) for key, cls in SECTIONS.items()},
        sample=from_section(SampleSettings, {k: v for k, v in sample.items() if k in shared}, "sample"),
        sampling={k: v for k, v in sample.items() if k not in shared},
    )


def common_fields() -> dict[str, Any]:
    """Every field that every config has, at its default, as nested dictionaries for a config file to start from."""
    defaults = asdict(Settings())
    del defaults["sampling"]
    return defaults
