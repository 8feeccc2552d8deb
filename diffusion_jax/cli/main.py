"""`diffusion-jax COMMAND ...`: find the command, parse its flags, and turn errors into a sentence and a status."""

import importlib
import logging
import os
import sys
from collections.abc import Sequence

from diffusion_jax.cli import arguments, xla
from diffusion_jax.errors import RunError, UserError
from diffusion_jax.plugs import suggest

COMMANDS = {
    "train": "train a model, or go on with a run; ends with samples and an evaluation",
    "sample": "make images with a trained model",
    "edit": "edit images with a trained model: reconstruction, interpolation, translation, variations, inpainting",
    "traverse": "show what single dimensions of a model's latent do",
    "evaluate": "judge a trained model, or a file of samples, against held-out images",
    "compare": "put several runs side by side: one table, and figures",
    "bench": "measure a config, or a network: times, multiply-adds, memory, a trace",
}


def usage() -> str:
    """The text of `diffusion-jax --help`."""
    rows = "\n".join(f"  {name:10s}{what}" for name, what in COMMANDS.items())
    return (
        f"usage: diffusion-jax COMMAND [--flag=value ...]\n\n{rows}\n\n"
        "diffusion-jax COMMAND --help lists a command's flags."
    )


def main(argv: Sequence[str]) -> int:
    """Run one command; `argv` begins with its name. Returns the exit status: 0, 1 (failed) or 2 (bad input)."""
    if not argv or argv[0] in ("--help", "-h", "help"):
        print(usage())
        return 0 if argv else 2
    name, *rest = argv
    try:
        if name not in COMMANDS:
            raise UserError(f"there is no command {name!r}; {suggest(name, COMMANDS)}.")
        command = importlib.import_module(f"diffusion_jax.cli.{name}")
        if {"--help", "-h", "--helpfull"} & set(rest):
            print(arguments.describe(name, command.__doc__, command.define))
            return 0
        command.main(rest)
    except KeyboardInterrupt:
        print(f"diffusion-jax {name}: interrupted.", file=sys.stderr)
        return 130
    except (UserError, RunError) as error:
        print(f"diffusion-jax {name}: {error}", file=sys.stderr)
        return error.status
    except OSError as error:
        print(f"diffusion-jax {name}: {error.filename or 'a file'}: {error.strerror or error}.", file=sys.stderr)
        return 2
    return 0


def run() -> None:
    """The console script."""
    xla.set_cpu_flags(os.environ)
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("diffusion_jax").setLevel(logging.INFO)
    for talkative in ("absl", "orbax"):
        logging.getLogger(talkative).setLevel(logging.ERROR)
    sys.exit(main(sys.argv[1:]))
