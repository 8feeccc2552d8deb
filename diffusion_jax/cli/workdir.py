"""A run's directory: the config that it was begun with, and its checkpoints."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusion_jax import families, files
from diffusion_jax.errors import UserError
from diffusion_jax.settings import common_fields
from diffusion_jax.tokenizers import TRAINED
from diffusion_jax.training.checkpoint import Checkpoints


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
    return any(path.name.isdigit() and path.is_dir() for path in (workdir / "checkpoints").glob("*"))


def saved_steps(workdir: Path) -> list[int]:
    """The steps at which a run was saved, ascending."""
    return Checkpoints(workdir).steps() if has_checkpoints(workdir) else []


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


def config_of(workdir: str, flag: str = "workdir") -> dict[str, Any]:
    """The config of a workdir, which `flag` named, with the tokenizer that it names where that is seen from here.

    Raises:
      UserError: where there is none.
    """
    config = saved_config(Path(workdir))
    if config is None:
        raise UserError(f"--{flag}={workdir}: there is no run here (no config.json); train one first.")
    family = config.get("family")
    text = str(family.get("tokenizer", "")) if isinstance(family, Mapping) else ""
    if not text.startswith(TRAINED):
        return config
    return config | {"family": family | {"tokenizer": TRAINED + str(tokenizer_of(Path(workdir), text))}}


def tokenizer_of(workdir: Path, text: str) -> Path:
    """Where a run's tokenizer is: where it stood in training, beside the run if both moved, or as the config's `text`.

    The last is relative to where the command is given, where another one of that name may be. That it is the same one
    its hash says, later.
    """
    named = Path(text.removeprefix(TRAINED))
    trained = Path((tokenizer_record(workdir) or {}).get("workdir", named))
    places = (trained, workdir.absolute().parent / named.name, named)
    return next((place for place in places if saved_config(place)), named)


def checkpoints_of(workdir: str, flag: str) -> Checkpoints:
    """The checkpoints in a workdir, which `flag` named, to read.

    Raises:
      UserError: where there is none.
    """
    if not has_checkpoints(Path(workdir)):
        raise UserError(f"--{flag}={workdir}: there is no checkpoint yet; go on training first.")
    return Checkpoints(Path(workdir))


def tokenizer_record(workdir: Path) -> dict[str, Any] | None:
    """What the newest checkpoint in a workdir says of the frozen tokenizer; None where there is none of either."""
    steps = saved_steps(workdir)
    return Checkpoints(workdir).about(steps[-1]).get("tokenizer") if steps else None


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config as JSON gives it back: tuples are lists."""
    return json.loads(json.dumps(config))
