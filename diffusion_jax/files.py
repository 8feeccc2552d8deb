"""Files that are whole or not there, and where what can be made again is kept."""

import fcntl
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from diffusion_jax.errors import UserError, require


def cache_directory() -> Path:
    """The user's cache of this project: $XDG_CACHE_HOME/diffusion_jax, by default ~/.cache/diffusion_jax."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffusion_jax"


@contextmanager
def whole(file: Path) -> Iterator[BinaryIO]:
    """Within, a stream to write to; afterwards `file` holds all of it, or is as it was where an exception was raised.

    Its directory is made where it is not there.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.", suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream
        os.chmod(partial, 0o644)  # mkstemp's files are private
        os.replace(partial, file)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def write_whole(file: Path, content: bytes) -> None:
    """Write a file whole or not at all; its directory is made where it is not there."""
    with whole(file) as stream:
        stream.write(content)


def check_can_write(flag: str, path: Path) -> None:
    """Raise `UserError` naming `flag` unless a directory or file could be made at `path`."""
    parent = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    require(parent.is_dir(), flag, str(path), f"{parent} is a file")
    require(os.access(parent, os.W_OK), flag, str(path), f"{parent} cannot be written to")


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Within, no other process is within for the same directory.

    Raises:
      UserError: where one is.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--workdir={directory}: another process is training there; wait for it.") from None
        yield


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object, whole or not at all."""
    write_whole(file, (json.dumps(content, indent=2) + "\n").encode())


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      UserError: where the file is not one.
    """
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as JSON ({error}).") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no JSON object.")
    return content
