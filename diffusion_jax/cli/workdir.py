"""A run's directory: what config it was begun with, and the weights in it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusion_jax import files
from diffusion_jax.cli.run import Run, assemble
from diffusion_jax.errors import UserError
from diffusion_jax.training.checkpoint import Checkpoints
from diffusion_jax.types import Weights


def check_config(workdir: Path, config: Mapping[str, Any], override: bool) -> None:
    """Raise `UserError`, naming the fields, where a run that has checkpoints was begun with another config."""
    fields = differences(saved_config(workdir), config) if has_checkpoints(workdir) else []
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
    """The run of a workdir, on the devices that are here, however many it was trained on.

    Raises:
      UserError: where there is no readable config.
    """
    config = saved_config(Path(workdir))
    if config is None:
        raise UserError(f"--workdir={workdir}: there is no run here (no config.json); train one first.")
    return assemble(config, training=False)


def load_weights(run: Run, workdir: str, profile: str, step: int | None) -> tuple[Weights, int]:
    """The weights of an averaging profile at a checkpoint, and its step; the newest where `step` is None.

    Raises:
      UserError: for an unknown profile, or a checkpoint that is not there or cannot be read.
    """
    profiles = ("none", *run.settings.train.ema)
    if profile not in profiles:
        raise UserError(f"--ema={profile}: there is no such averaging profile; known: {', '.join(profiles)}.")
    if not has_checkpoints(Path(workdir)):
        raise UserError(f"--workdir={workdir}: there is no checkpoint yet; go on training first.")
    checkpoints = Checkpoints(Path(workdir))
    steps = checkpoints.steps()
    if step is not None and step not in steps:
        raise UserError(f"--step={step}: there is no such checkpoint; there are {', '.join(map(str, steps))}.")
    step = steps[-1] if step is None else step
    return checkpoints.restore_weights(run.weights_like(), step, profile), step
