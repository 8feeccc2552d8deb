"""The loop: one program for any number of steps, tasks at their steps, no host sync, a clear end when all is lost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.errors import RunError
from diffusion_jax.settings import TrainSettings
from diffusion_jax.training import loop
from tests.training import toys


def run(program, feed, train, start=0, state=None, tasks=(), log=lambda step, metrics: None, stop=lambda: False):
    state = program.init() if state is None else state
    return loop.run(program, feed, state, start, train, frozen={}, tasks=tasks, log=log, stop=stop)


def test_how_steps_are_dispatched_changes_no_bit():
    """Eight steps in dispatches of four, of one, and stopped and taken up again: the same bits, one compilation."""
    _, program, feed = toys.digits_run(toys.mesh())
    whole, _ = run(program, feed, TrainSettings(steps=8, batch_size=16, log_every=4))
    single, _ = run(program, feed, TrainSettings(steps=8, batch_size=16, log_every=1))
    half, step = run(program, feed, TrainSettings(steps=3, batch_size=16, log_every=4))
    resumed, _ = run(program, feed, TrainSettings(steps=8, batch_size=16, log_every=4), start=step, state=half)
    for other in (single, resumed):
        jax.tree.map(np.testing.assert_array_equal, whole.params, other.params)
    assert program.advance._cache_size() == 1


def test_log_lines_are_means_over_their_steps():
    _, program, feed = toys.digits_run(toys.mesh())
    coarse, fine = {}, {}
    run(program, feed, TrainSettings(steps=8, batch_size=16, log_every=4), log=coarse.__setitem__)
    run(program, feed, TrainSettings(steps=8, batch_size=16, log_every=1), log=fine.__setitem__)
    assert sorted(coarse) == [4, 8]
    assert sorted(fine) == list(range(1, 9))
    for end in (4, 8):
        expected = np.mean([fine[step]["loss"] for step in range(end - 3, end + 1)])
        assert coarse[end]["loss"] == pytest.approx(expected, rel=1e-6)


def test_tasks_run_at_their_steps_with_the_state_of_that_step():
    seen = []
    task = loop.Task(every=3, act=lambda state, step: seen.append((step, int(state.step))))
    never = loop.Task(every=0, act=lambda state, step: seen.append("never"))
    _, program, feed = toys.digits_run(toys.mesh())
    run(program, feed, TrainSettings(steps=8, batch_size=16, log_every=4), tasks=(task, never))
    assert seen == [(3, 3), (6, 6)]


def test_it_stops_when_asked():
    _, program, feed = toys.digits_run(toys.mesh())
    answers = iter([False, True])
    state, step = run(program, feed, TrainSettings(steps=8, batch_size=16, log_every=4), stop=lambda: next(answers))
    assert step == int(state.step) == 4


def test_a_run_that_diverges_ends_with_a_sentence():
    """A learning rate of 1e30 makes the parameters infinite after one step, and every gradient after it."""
    chosen = {"learning_rate": 1e30, "clip_norm": 0.0, "optimizer": "sgd", "max_skipped": 3, "steps": 40}
    _, program, feed = toys.digits_run(toys.mesh(), **chosen)
    saved = []
    task = loop.Task(every=20, act=lambda state, step: saved.append(step))
    with pytest.raises(RunError, match="3 steps in a row"):
        run(program, feed, TrainSettings(batch_size=16, log_every=4, **chosen), tasks=(task,))
    assert not saved


def test_the_state_is_donated():
    _, program, feed = toys.digits_run(toys.mesh())
    state = program.init()
    program.advance(state, feed.chunk(0, 1), jnp.int32(1), {})
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
