"""Checkpoints: whole, sparse on disk, readable in another layout, and honest when damaged."""

import jax
import numpy as np
import pytest

from diffusion_jax.errors import UserError
from diffusion_jax.settings import CheckpointSettings
from diffusion_jax.training.checkpoint import Checkpoints
from tests.training import toys

WIDE = "dit(patch=4,width=128,depth=1,heads=2)"


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_what_is_saved_comes_back_in_any_layout(tmp_path):
    """Saved from 8 devices cut three ways, restored on one and on eight cut otherwise: the same bits."""
    _, program, _ = toys.digits_run(toys.mesh(2, 2, 2), network=WIDE)
    state = program.init()
    checkpoints = Checkpoints(tmp_path, CheckpointSettings())
    checkpoints.save(state, 0, {"examples": 0})
    checkpoints.close()
    for layout in (toys.mesh(), toys.mesh(1, 8, 1)):
        _, other, _ = toys.digits_run(layout, network=WIDE)
        reader = Checkpoints(tmp_path)
        restored = reader.restore(other.abstract, 0)
        equal(state, restored)
        assert all(jax.tree.leaves(jax.tree.map(lambda a, b: a.sharding == b.sharding, restored, other.abstract)))
        for profile, expected in (("none", state.params), ("main", state.ema["main"])):
            equal(expected, reader.restore_weights(other.abstract.params, 0, profile))
        reader.close()


def test_the_newest_and_every_mth_are_kept(tmp_path):
    _, program, _ = toys.digits_run(toys.mesh())
    state = program.init()
    checkpoints = Checkpoints(tmp_path, CheckpointSettings(every=2, keep=2, keep_every=4))
    for step in range(1, 8):
        checkpoints.save(state, step, {})
    checkpoints.close()
    reader = Checkpoints(tmp_path)
    assert reader.steps() == [4, 6, 7]
    reader.close()


@pytest.mark.parametrize("item", ["params", "opt_state", "rest"])
def test_a_damaged_checkpoint_is_named_with_what_to_do(tmp_path, item):
    _, program, _ = toys.digits_run(toys.mesh())
    checkpoints = Checkpoints(tmp_path, CheckpointSettings())
    state = program.init()
    checkpoints.save(state, 3, {})
    checkpoints.save(state, 5, {})
    checkpoints.wait()
    for file in (tmp_path / "checkpoints" / "5" / item).rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(UserError, match=r"checkpoints/5 .* step 3"):
        checkpoints.restore(program.abstract, 5)
    equal(state, checkpoints.restore(program.abstract, 3))
    checkpoints.close()
