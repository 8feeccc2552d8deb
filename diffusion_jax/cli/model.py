"""A model, assembled from its config: its weights, and the frozen ones of another run that it needs beside them.

Building one compiles nothing and writes nothing.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from diffusion_jax import families, plugs, settings, tree
from diffusion_jax.cli.workdir import checkpoints_of, config_of, plain
from diffusion_jax.errors import UserError, require
from diffusion_jax.families.tokenizer import function_of
from diffusion_jax.sampling import Sampler
from diffusion_jax.tokenizers import TRAINED
from diffusion_jax.training import posthoc, sharding
from diffusion_jax.training.checkpoint import abstract_like
from diffusion_jax.training.ema import Power, averaging_rules
from diffusion_jax.types import Family, ImageSpec, Tree, Weights


@dataclass(frozen=True, kw_only=True)
class Model:
    """What a config says of the model: enough to sample, without the data.

    Attributes:
      config: nested plain dictionaries, as JSON keeps them.
      options: the config's own sampling options.
      tokenizer: the trained one that the family is over; None where there is none.
    """

    config: dict[str, Any]
    settings: settings.Settings
    spec: ImageSpec
    family: Family
    mesh: Mesh
    sampler: Sampler
    options: Tree
    tokenizer: "Trained | None" = None

    def weights_like(self) -> Weights:
        """Shapes and shardings of the weights."""
        shapes = weight_shapes(self.family)
        return abstract_like(shapes, sharding.infer({"params": shapes}, self.mesh, self.settings.mesh)["params"])


def assemble_model(config: Mapping[str, Any], spec: ImageSpec, mesh: Mesh | None = None) -> Model:
    """Check a config and build its model for images of `spec`, on all devices where no mesh is given.

    Raises:
      UserError: naming the field, its value and what would be right.
    """
    checked = settings.from_config(config)
    mesh = mesh or sharding.make_mesh(settings.MeshSettings())
    trained = open_tokenizer(checked.family, spec)
    family = families.build(checked.family, spec, checked.precision, trained and trained.model.family.tokenizer)
    return Model(
        config=plain(config),
        settings=checked,
        spec=spec,
        family=family,
        mesh=mesh,
        sampler=Sampler(family.generate, spec, mesh, checked.sample.batch_size),
        options=family.sampling(checked.sampling),
        tokenizer=trained,
    )


def weight_shapes(family: Family) -> Weights:
    """The family's weights as shapes."""
    return jax.eval_shape(family.init, jax.random.key(0))[0]


# ---------------------------------------------------------------------------------------------- frozen tokenizers


TOKENIZER = "config.family.tokenizer"
"""The flag that names one."""


class Frozen(NamedTuple):
    """What a family needs of other runs: arrays for its functions, and plain JSON for a checkpoint of what they are."""

    tree: Mapping[str, Tree]
    about: Mapping[str, Any]

    def as_weights(self) -> dict[str, Tree]:
        """For `weights | frozen.as_weights()`, and as the `frozen` of a training step."""
        return {"tokenizer": dict(self.tree)} if self.tree else {}


NOTHING = Frozen({}, {})


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A tokenizer that the run in `workdir` trained."""

    workdir: str
    model: Model

    def load(self, mesh: Mesh, record: Mapping[str, Any] | None) -> Frozen:
        """Its averaged parameters on all devices of `mesh`: of the newest checkpoint, or of the one in `record`.

        Args:
          mesh: the devices.
          record: what a checkpoint says of the tokenizer that it was trained with; None for a new run.

        Its hash is of these and of what they are read by. How it is trained on afterwards does not count.

        Raises:
          UserError: where that checkpoint is not there any more, or has other parameters than it had, or where the
            run's config has another network or bottleneck.
        """
        profile = record["ema"] if record else self.model.settings.sample.ema
        wanted = record and record["step"]
        steps = checkpoints_of(self.workdir, TOKENIZER).steps()
        rule = f"its checkpoint of step {wanted}, over which this model was trained, is not there any more"
        require(wanted is None or wanted in steps, f"--{TOKENIZER}", self.workdir, rule)
        weights, step = load_weights(self.model, self.workdir, profile, wanted)
        params = weights[self.model.family.tokenizer.player]
        function = function_of(self.model.settings.family) | {"precision": self.model.settings.precision}
        about = {"workdir": str(Path(self.workdir).absolute()), "step": step, "ema": profile}
        about["hash"] = tree.fingerprint(params, function)
        fine = record is None or record["hash"] == about["hash"]
        rule = f"its network, bottleneck or parameters at step {step} are not those that this model was trained over"
        require(fine, f"--{TOKENIZER}", self.workdir, rule)
        everywhere = NamedSharding(mesh, P())
        placed = jax.tree.map(lambda x: tree.place(np.asarray(x), everywhere), params)
        return Frozen({"params": placed}, about)


def open_tokenizer(section: Mapping[str, Any], spec: ImageSpec) -> Trained | None:
    """The trained tokenizer that a config's `family` section names, for images of `spec`; None where it names none.

    Raises:
      UserError: where there is no checkpoint of a tokenizer, or it is one of other images.
    """
    text = str(section.get("tokenizer", ""))
    if not text.startswith(TRAINED):
        return None
    workdir = text.removeprefix(TRAINED)
    require(bool(workdir), f"--{TOKENIZER}", text, "must go on with the workdir of a run that trained one")
    model = open_model(workdir, TOKENIZER)
    rule = f"is a run of the family {model.family.name}, which trains no tokenizer"
    require(model.family.tokenizer is not None, f"--{TOKENIZER}", text, rule)
    rule = f"was trained on images of {model.spec.shape}, and these are of {spec.shape}"
    require(model.spec.shape == spec.shape, f"--{TOKENIZER}", text, rule)
    return Trained(workdir=workdir, model=model)


def standardising(frozen: Frozen, mesh: Mesh, shift: np.ndarray, scale: np.ndarray) -> Frozen:
    """With the mean and the inverse deviation f32[channels] of what the tokenizer makes of the training images."""
    everywhere = NamedSharding(mesh, P())
    numbers = {"shift": np.float32(shift), "scale": np.float32(scale)}
    return Frozen(
        {**frozen.tree} | {name: tree.place(value, everywhere) for name, value in numbers.items()},
        {**frozen.about} | {name: value.tolist() for name, value in numbers.items()},
    )


def thawed(model: Model, record: Mapping[str, Any] | None) -> Frozen:
    """What a checkpoint of `model` needs beside its own weights, where `record` is what it says of that."""
    if model.tokenizer is None:
        return NOTHING
    frozen = model.tokenizer.load(model.mesh, record)
    if record and "shift" in record:
        return standardising(frozen, model.mesh, record["shift"], record["scale"])
    return frozen


# ---------------------------------------------------------------------------------------------- from a workdir


def open_model(workdir: str, flag: str = "workdir") -> Model:
    """The model of a workdir, which `flag` named, without its data: a checkpoint says what the images look like.

    Raises:
      UserError: where there is no readable config or no checkpoint.
    """
    config, checkpoints = config_of(workdir, flag), checkpoints_of(workdir, flag)
    about = checkpoints.about(checkpoints.steps()[-1])
    try:
        spec = ImageSpec(**about["spec"])
    except (KeyError, TypeError):
        raise UserError(f"--{flag}={workdir}: its checkpoint does not say what the images look like.") from None
    return assemble_model(config, spec)


def load_weights(model: Model, workdir: str, profile: str, step: int | None, prefix: str = "") -> tuple[Weights, int]:
    """The weights of an averaging profile at a checkpoint, and its step; the newest where `step` is None.

    `prefix` is that of the flags --workdir and --step, for errors.

    "posthoc(std=0.1)" is an average that was never kept, made of the kept ones (see `training.posthoc`).

    Raises:
      UserError: for an unknown profile, or a checkpoint that is not there or cannot be read.
    """
    profiles = ("none", *model.settings.train.ema)
    afterwards = plugs.parse("--ema", profile)[0] == "posthoc"
    if profile not in profiles and not afterwards:
        known = ", ".join((*profiles, "posthoc(std=...)"))
        raise UserError(f"--ema={profile}: there is no such averaging profile; known: {known}.")
    checkpoints = checkpoints_of(workdir, f"{prefix}workdir")
    steps = checkpoints.steps()
    if step is not None and step not in steps:
        raise UserError(f"--{prefix}step={step}: there is no such checkpoint; there are {', '.join(map(str, steps))}.")
    step = steps[-1] if step is None else step
    load = functools.partial(checkpoints.restore_weights, model.weights_like())
    frozen = thawed(model, checkpoints.about(step).get("tokenizer")).as_weights()
    if not afterwards:
        return load(step, profile) | frozen, step
    std = plugs.build("--ema", profile, {"posthoc": Power}).std
    try:
        stored = posthoc.snapshots(steps, averaging_rules(model.settings.train), step)
    except UserError as error:
        raise UserError(f"--ema={profile}: {error}") from None
    return posthoc.combine(stored, std, step, load) | frozen, step
