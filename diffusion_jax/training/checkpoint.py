"""Checkpoints: whole or not there at all. Orbax behind one class of ours.

WORKDIR/checkpoints/STEP/ holds the parts of the `TrainState` as separate items, so that sampling reads the weights of
one averaging profile and nothing else, and `about`, a JSON of the data position and of what the run was.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from diffusion_jax.errors import UserError
from diffusion_jax.files import read_json
from diffusion_jax.settings import CheckpointSettings
from diffusion_jax.tree import path_name
from diffusion_jax.types import TrainState, Tree, Weights

PARTS = {"params": ("params",), "opt_state": ("opt_state",), "ema": ("ema",), "rest": ("step", "extra", "skipped")}
"""Item of a checkpoint -> the fields of `TrainState` in it."""


class Checkpoints:
    """The checkpoints of a workdir.

    Args:
      workdir: the run's directory.
      settings: which checkpoints to keep; None to read only.
    """

    def __init__(self, workdir: Path, settings: CheckpointSettings | None = None) -> None:
        self.directory = Path(workdir).absolute() / "checkpoints"
        options = ocp.CheckpointManagerOptions(create=False, read_only=True)
        if settings:
            options = ocp.CheckpointManagerOptions(
                max_to_keep=settings.keep,
                keep_period=settings.keep_every or None,
                cleanup_tmp_directories=True,  # of a save that was killed half-way
            )
        self.manager = ocp.CheckpointManager(self.directory, options=options)

    def steps(self) -> list[int]:
        """The steps of the whole checkpoints, ascending."""
        return sorted(self.manager.all_steps())

    def save(self, state: TrainState, step: int, about: Mapping[str, Any]) -> None:
        """Write `state` in the background; its arrays may be donated as soon as this returns.

        Args:
          state: the state to save.
          step: its number of finished steps; nothing is written where that step is saved already.
          about: plain JSON: the position in the data, the config, what the images look like.
        """
        if step in self.manager.all_steps():
            return
        items = {item: ocp.args.PyTreeSave(fields_of(state, item)) for item in PARTS}
        about = {**about, "shapes": {item: shapes(fields_of(state, item)) for item in PARTS}}
        self.manager.save(step, args=ocp.args.Composite(**items, about=ocp.args.JsonSave(about)), force=True)

    def check(self, abstract: TrainState, step: int) -> None:
        """Raise `UserError` unless the checkpoint at `step` holds just the arrays of `abstract`, in their shapes."""
        for item in PARTS:
            self._check(step, item, fields_of(abstract, item), whole=True)

    def restore(self, abstract: TrainState, step: int) -> TrainState:
        """The state at `step`, laid out as `abstract` (shapes and shardings) says.

        Raises:
          UserError: where the checkpoint is damaged or of another model.
        """
        self.check(abstract, step)
        restored = self._read(step, {item: fields_of(abstract, item) for item in PARTS})
        return TrainState(**{name: value for item in PARTS for name, value in restored[item].items()})

    def restore_weights(self, abstract: Weights, step: int, profile: str) -> Weights:
        """The weights of one averaging profile, or with "none" the plain parameters, laid out as `abstract`.

        Raises:
          UserError: where the checkpoint is damaged or of another model.
        """
        item = "params" if profile == "none" else "ema"
        wanted = {"params": abstract} if profile == "none" else {"ema": {profile: abstract}}
        self._check(step, item, wanted, whole=profile == "none")
        restored = self._read(step, {item: wanted})[item][item]
        return restored if profile == "none" else restored[profile]

    def about(self, step: int) -> dict[str, Any]:
        """What was said about the checkpoint at `step` when it was saved."""
        return read_json(self.directory / str(step) / "about" / "metadata")

    def _check(self, step: int, item: str, wanted: Tree, whole: bool) -> None:
        saved = self.about(step).get("shapes", {}).get(item, {})
        expected = shapes(wanted)
        names = {*saved, *expected} if whole else expected
        for name in sorted(names):
            if saved.get(name) != expected.get(name):
                was, now = (f"shape {table[name]}" if name in table else "absent" for table in (saved, expected))
                raise UserError(
                    f"{self.directory / str(step)} is of another model: {name} is {was} there and {now} in this "
                    "config; take the config that it was trained with, or another workdir."
                )

    def _read(self, step: int, wanted: Mapping[str, Tree]) -> Mapping[str, Tree]:
        def into(tree: Tree) -> ocp.args.PyTreeRestore:
            restore_args = ocp.checkpoint_utils.construct_restore_args(tree)
            return ocp.args.PyTreeRestore(item=tree, restore_args=restore_args, partial_restore=True)

        try:
            args = ocp.args.Composite(**{item: into(tree) for item, tree in wanted.items()})
            return self.manager.restore(step, args=args)
        except Exception as error:  # orbax, tensorstore and the file system each raise their own
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            sys.unraisablehook = lambda unraisable: (
                None
            )  # orbax's abandoned coroutines would complain after our sentence
            others = [str(other) for other in self.steps() if other != step]
            advice = f"move it away to go on from step {others[-1]}" if others else "and it is the only checkpoint"
            raise UserError(f"{self.directory / str(step)} cannot be restored ({reason[:300]}); {advice}.") from error

    def wait(self) -> None:
        """Block until the last save is on disk."""
        self.manager.wait_until_finished()

    def close(self) -> None:
        """Finish and release the threads."""
        self.wait()
        self.manager.close()


def fields_of(state: TrainState, item: str) -> dict[str, Tree]:
    """The fields of the state that an item of a checkpoint holds."""
    return {name: getattr(state, name) for name in PARTS[item]}


def shapes(tree: Tree) -> dict[str, list[int]]:
    """{path: shape} of every leaf, as JSON has it."""
    return {path_name(path): list(leaf.shape) for path, leaf in jax.tree.leaves_with_path(tree)}


def abstract_like(tree: Tree, shardings: Tree) -> Tree:
    """`jax.ShapeDtypeStruct`s with shardings: what to restore into."""
    return jax.tree.map(lambda s, sh: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sh), tree, shardings)
