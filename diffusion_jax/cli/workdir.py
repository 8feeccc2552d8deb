"""A run's directory: what config it was begun with, and the weights in it."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusion_jax import families, files, plugs
from diffusion_jax.cli.run import Model, Run, assemble, assemble_model, plain
from diffusion_jax.errors import UserError
from diffusion_jax.settings import common_fields
from diffusion_jax.training import posthoc
from diffusion_jax.training.checkpoint import Checkpoints
from diffusion_jax.training.ema import Power, averaging_rules
from diffusion_jax.types import ImageSpec, Weights


def check_config(workdir: Path, config: Mapping[str, Any], override: bool) -> None:
    """Raise `UserError`, naming the fields, where a run that has checkpoints was begun with another config."""
    saved = saved_config(workdir) if has_checkpoints(workdir) else None
    fields = differences(completed(saved), config) if saved else []
    if fields and not override:
        raise UserError(
            f"--workdir={workdir} was begun with another config: {'; '.join(fields)}; "
            "take another workdir, or go on under the new config with --override."
        )


def keep_config(workdir: Path, config: Mapping[str, Any]) -> None:
    """Write config.json; one that differs is kept beside it."""
    saved = saved_config(workdir)
    if saved is not None and saved != config:
        number = len(list(workdir.glob("config.before-*.json")))
        files.write_json(workdir / f"config.before-{number}.json", saved)
    if saved != config:
        files.write_json(workdir / "config.json", config)


def saved_config(workdir: Path) -> dict[str, Any] | None:
    """The config in a workdir, if there is one."""
    file = workdir / "config.json"
    return files.read_json(file) if file.exists() else None


def has_checkpoints(workdir: Path) -> bool:
    """Whether a run was saved here."""
    return any(path.name.isdigit() for path in (workdir / "checkpoints").glob("*"))


def completed(saved: Mapping[str, Any]) -> dict[str, Any]:
    """A saved config with the fields that did not exist yet when it was saved, at their defaults.

    Sections whose entries are the user's own (averaging profiles) stay as they are.
    """
    family, sample = families.default_fields(saved["family"]["name"])
    defaults = common_fields() | {"family": family}
    defaults["sample"] |= sample
    return {
        name: {**defaults[name], **saved.get(name, {})} if isinstance(default, Mapping) else saved.get(name, default)
        for name, default in plain(defaults).items()
    }


def differences(saved: Mapping[str, Any] | None, config: Mapping[str, Any], path: str = "") -> list[str]:
    """`"train.steps is 10, was 20"` for every field in which two configs differ."""
    found = []
    for key in sorted({*(saved or {}), *config}):
        old, new = (saved or {}).get(key), config.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{path}{key}.")
        elif old != new:
            found.append(f"{path}{key} is {new!r}, was {old!r}")
    return found


def open_run(workdir: str) -> Run:
    """The run of a workdir with its data, on the devices that are here, however many it was trained on.

    Raises:
      UserError: where there is no readable config.
    """
    return assemble(config_of(workdir), training=False)


def open_model(workdir: str, flag: str = "workdir") -> Model:
    """The model of a workdir, which `flag` named, without its data: a checkpoint says what the images look like.

    Raises:
      UserError: where there is no readable config or no checkpoint.
    """
    config, checkpoints = config_of(workdir, flag), _checkpoints_of(workdir, flag)
    spec = checkpoints.about(checkpoints.steps()[-1])["spec"]
    return assemble_model(config, ImageSpec(**spec))


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
    checkpoints = _checkpoints_of(workdir, f"{prefix}workdir")
    steps = checkpoints.steps()
    if step is not None and step not in steps:
        raise UserError(f"--{prefix}step={step}: there is no such checkpoint; there are {', '.join(map(str, steps))}.")
    step = steps[-1] if step is None else step
    load = functools.partial(checkpoints.restore_weights, model.weights_like())
    if not afterwards:
        return load(step, profile), step
    std = plugs.build("--ema", profile, {"posthoc": Power}).std
    try:
        stored = posthoc.snapshots(steps, averaging_rules(model.settings.train), step)
    except UserError as error:
        raise UserError(f"--ema={profile}: {error}") from None
    return posthoc.combine(stored, std, step, load), step


def config_of(workdir: str, flag: str = "workdir") -> dict[str, Any]:
    """The config of a workdir, which `flag` named.

    Raises:
      UserError: where there is none.
    """
    config = saved_config(Path(workdir))
    if config is None:
        raise UserError(f"--{flag}={workdir}: there is no run here (no config.json); train one first.")
    return config


def _checkpoints_of(workdir: str, flag: str) -> Checkpoints:
    if not has_checkpoints(Path(workdir)):
        raise UserError(f"--{flag}={workdir}: there is no checkpoint yet; go on training first.")
    return Checkpoints(Path(workdir))
