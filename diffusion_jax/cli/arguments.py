"""Flags: absl's and ml_collections', with every failure made one sentence."""

import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from diffusion_jax.errors import UserError
from diffusion_jax.plugs import suggest

FORMS = (
    (bool, r"(?i)|true|false|t|f|1|0", "true or false"),
    (int, r"[+-]?\d+", "a whole number"),
    (float, r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?inf|nan", "a number"),
)
"""Of a config field's type: what may be written, and how to say that."""

Define = Callable[[flags.FlagValues, Sequence[str]], None]
"""Defines a command's flags on (the flag values, the arguments that will be parsed)."""


def define_config(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """The flag `--config=FILE[:FAMILY]` and its overrides `--config.path.to.field=value`."""
    config_flags.DEFINE_config_file(
        "config",
        None,
        "the config file, and after a colon the family: configs/digits.py:diffusion. "
        "--config.path.to.field=value changes a field.",
        flag_values=values,
        sys_argv=["", *argv],
    )


def parse(command: str, define: Define, argv: Sequence[str]) -> flags.FlagValues:
    """The command's flags from `argv`.

    Raises:
      UserError: for unknown flags, wrong types, and whatever is wrong with a config.
    """
    argv = _joined(argv)
    values = flags.FlagValues()
    define(values, argv)
    if "config" in values:
        _check_config(argv)
    try:
        rest = values([command, *argv])
    except Exception as error:  # absl's and ml_collections' errors have no base in common
        raise UserError(_sentence(error)) from error
    if len(rest) > 1:
        raise UserError(f"{rest[1]!r} is no flag; write --name=value.")
    return values


def config_of(values: flags.FlagValues) -> dict[str, Any]:
    """The parsed `--config` as nested plain dictionaries.

    Raises:
      UserError: where the flag is missing.
    """
    if values.config is None:
        raise UserError(
            "--config is missing; write --config=FILE:FAMILY, such as --config=configs/digits.py:diffusion."
        )
    return values.config.to_dict()


def required(values: flags.FlagValues, name: str) -> Any:
    """The value of a flag that must be given."""
    if values[name].value in (None, ""):
        raise UserError(f"--{name} is missing; give it as --{name}=..., {values[name].help}.")
    return values[name].value


def describe(command: str, about: str, define: Define) -> str:
    """The text of `diffusion-jax COMMAND --help`."""
    values = flags.FlagValues()
    define(values, [])
    rows = []
    for name in sorted(values):
        flag = values[name]
        default = "" if flag.default in (None, "") else f" (default: {flag.default})"
        rows += [f"  --{name}", textwrap.indent(textwrap.fill(flag.help + default, 100), 6 * " ")]
    return f"usage: diffusion-jax {command} [--flag=value ...]\n\n{about.strip()}\n\n" + "\n".join(rows)


def _joined(argv: Sequence[str]) -> list[str]:
    """`--config FILE` and `--config.a.b VALUE` as `--config=FILE` and `--config.a.b=VALUE`."""
    joined = []
    for arg in argv:
        if joined and re.fullmatch(r"--?config[\w.]*", joined[-1]) and not arg.startswith("-"):
            joined[-1] += f"={arg}"
        else:
            joined.append(arg)
    return joined


def _check_config(argv: Sequence[str]) -> None:
    """Say precisely what ml_collections would refuse unclearly, or take silently."""
    paths = [arg.split("=", 1)[1] for arg in argv if re.match(r"--?config=", arg)]
    if not paths:
        return
    file = Path(paths[-1].split(":", 1)[0])
    if not file.is_file():
        raise UserError(f"--config={paths[-1]}: there is no file {file}.")
    try:
        config = config_flags.config_flags.ConfigFileFlagParser("config").parse(paths[-1])
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"--config={paths[-1]}: the file does not run ({_sentence(error)}).") from error
    for arg in argv:
        match = re.match(r"--?config\.([^=]+)=?(.*)", arg, re.DOTALL)
        if match:
            _check_field(config, *match.groups())


def _check_field(config: ConfigDict, path: str, value: str) -> None:
    section: Any = config
    names = path.split(".")
    for depth, name in enumerate(names):
        here = ".".join(("config", *names[:depth]))
        if not isinstance(section, Mapping | ConfigDict):
            raise UserError(f"--config.{path}: {here} is {section!r} and has no field {name!r}; set --{here} itself.")
        if name not in section:
            raise UserError(f"--config.{path}: {here} has no field {name!r}; {suggest(name, section)}.")
        section = section[name]
    if isinstance(section, Mapping | ConfigDict):
        raise UserError(f"--config.{path} is a section; set its fields one by one: {', '.join(sorted(section))}.")
    for kind, form, name in FORMS:
        if type(section) is kind and not re.fullmatch(form, value.strip()):
            raise UserError(f"--config.{path}={value}: must be {name}, such as {section}.")


def _sentence(error: Exception) -> str:
    """An error's last line, ended with a full stop."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[-1] if lines else type(error).__name__
    return text.rstrip(" .?") + "."
