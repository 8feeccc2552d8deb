"""Imports point one way: a room may use the rooms above it in docs/architecture.md, never those below."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "diffusion_jax"
FOUNDATION = ("errors", "types", "files", "plugs", "rng", "tree", "settings", "grey")
ROOMS = {
    "networks": FOUNDATION,
    "diffusion": FOUNDATION,
    "adversarial": FOUNDATION,
    "variational": FOUNDATION,
    "latents": FOUNDATION,
    "tokenizers": (*FOUNDATION, "networks", "variational"),
    "families": (*FOUNDATION, "networks", "diffusion", "adversarial", "variational", "tokenizers"),
    "data": FOUNDATION,
    "training": (*FOUNDATION, "data"),
    "sampling": (*FOUNDATION, "data", "training"),
    "evaluation": (*FOUNDATION, "networks", "data"),
}
"""Who may be imported by whom, besides oneself. `cli` may import everything, and nobody imports it but configs."""

FILES = sorted(PACKAGE.rglob("*.py"))


def imported(file):
    """Dotted names of all that a file imports."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(name):
    """`data` for `diffusion_jax.data.feed.Feed`; None for other packages."""
    parts = name.split(".")
    return parts[1] if parts[0] == "diffusion_jax" and len(parts) > 1 else None


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_one_way(file):
    here = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if here in ("cli", "__main__", "__init__"):
        return
    allowed = {here, *ROOMS.get(here, FOUNDATION[: FOUNDATION.index(here)] if here in FOUNDATION else ())}
    wrong = [name for name in imported(file) if room(name) and room(name) not in allowed]
    assert not wrong, f"{here} may import {sorted(allowed)}, not {wrong}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_only_networks_know_flax_modules(file):
    if file.relative_to(PACKAGE).parts[0] != "networks":
        assert not [name for name in imported(file) if name.split(".")[0] == "flax"]


def test_types_import_jax_only():
    foreign = {name.split(".")[0] for name in imported(PACKAGE / "types.py")} - set(sys.stdlib_module_names)
    assert foreign == {"jax"}


def test_every_room_is_known():
    rooms = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if not path.name.startswith("_")}
    assert rooms == {*FOUNDATION, *ROOMS, "cli"}
