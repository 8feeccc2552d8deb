"""The step: who moves, by how much, and what happens when something is not finite."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusion_jax.errors import UserError
from diffusion_jax.settings import TrainSettings
from diffusion_jax.training import optimizer
from diffusion_jax.training.step import Trainer
from tests.training import toys

pytestmark = pytest.mark.usefixtures("quick_compilation")

SGD = {"optimizer": "sgd", "learning_rate": 0.5, "clip_norm": 0.0, "batch_size": 4}


def steps(trainer, values):
    """The states after each step on batches of a constant value."""
    state, step, states = trainer.init(), jax.jit(trainer.step), []
    for value in values:
        state, metrics = step(state, toys.batch(value), {})
        states.append((state, metrics))
    return states


def test_players_move_in_order_and_alone():
    """leader <- 1 - r image; follower <- 1 - r * (the leader's new value): by hand."""
    trainer = Trainer(toys.leader_and_follower(), TrainSettings(**SGD), seed=0)
    ((state, metrics),) = steps(trainer, [0.5])
    assert float(state.params["leader"]["w"]) == 1.0 - 0.5 * 0.5
    assert float(state.params["follower"]["w"]) == 1.0 - 0.5 * 0.75
    assert float(metrics["leader/loss"]) == 0.5
    assert float(metrics["follower/loss"]) == 0.75
    assert int(state.extra["seen"]) == 1


def test_schedules_are_of_steps_for_players_that_rest():
    """A player that moves every fifth step walks the whole cosine, in a fifth of the updates."""
    settings = TrainSettings(**SGD, steps=100, learning_rate_schedule="cosine_decay_schedule")
    moves = optimizer.build(settings, every=5)
    state = moves.init(jnp.float32(0.0))
    for update in range(20):
        change, state = moves.update(jnp.float32(1.0), state, jnp.float32(0.0))
        np.testing.assert_allclose(change, -0.25 * (1.0 + np.cos(np.pi * 5 * update / 100)), rtol=1e-5)


def test_a_projection_follows_the_update_before_anyone_looks():
    """The leader is halved after its step of 0.25; the follower and the averages see 0.75 / 2."""
    family = toys.leader_and_follower()
    leader, follower = family.players
    halving = replace(leader, project=lambda own: {"w": own["w"] / 2})
    family = replace(family, players=(halving, follower))
    trainer = Trainer(family, TrainSettings(**SGD, ema={"fixed": "constant(decay=0.75)"}), seed=0)
    ((state, _),) = steps(trainer, [0.5])
    assert float(state.params["leader"]["w"]) == 0.375
    assert float(state.params["follower"]["w"]) == 1.0 - 0.5 * 0.375
    assert float(state.ema["fixed"]["leader"]["w"]) == 0.75 * 1.0 + 0.25 * 0.375


def test_a_player_rests_between_its_turns():
    trainer = Trainer(toys.leader_and_follower(follower_every=2), TrainSettings(**SGD), seed=0)
    states = steps(trainer, [0.5] * 4)
    follower = [float(state.params["follower"]["w"]) for state, _ in states]
    assert follower[0] == follower[1] != follower[2] == follower[3]
    assert [bool(jnp.isnan(metrics["follower/loss"])) for _, metrics in states] == [False, True, False, True]
    assert [int(state.extra["seen"]) for state, _ in states] == [1, 1, 2, 2]


def test_ema_profiles_follow_their_formulas():
    """Constant: e <- d e + (1 - d) p. Warm-up: d = min(decay, (1 + n) / (10 + n)). In NumPy, step by step."""
    rules = {"fixed": "constant(decay=0.75)", "warm": "warmup(decay=0.3)"}
    trainer = Trainer(toys.leader_and_follower(), TrainSettings(**SGD, ema=rules), seed=0)
    decays = {"fixed": lambda n: 0.75, "warm": lambda n: min(0.3, (1 + n) / (10 + n))}
    expected = dict.fromkeys(rules, 1.0)
    for n, (state, _) in enumerate(steps(trainer, [0.25, -0.5, 1.0, 0.125]), start=1):
        for name, decay in decays.items():
            expected[name] = decay(n) * expected[name] + (1 - decay(n)) * float(state.params["leader"]["w"])
            np.testing.assert_allclose(state.ema[name]["leader"]["w"], expected[name], rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_skipped_and_counted(bad):
    """A step with a bad batch changes nothing but the counters; the next good one goes on."""
    trainer = Trainer(toys.leader_and_follower(), TrainSettings(**SGD), seed=0)
    (good, _), (skipped, _), (again, _) = steps(trainer, [0.5, bad, 0.5])
    for name in ("params", "opt_state", "ema", "extra"):
        jax.tree.map(np.testing.assert_array_equal, getattr(good, name), getattr(skipped, name))
    assert {name: int(n) for name, n in skipped.skipped.items()} == {"total": 1, "in_a_row": 1}
    assert {name: int(n) for name, n in again.skipped.items()} == {"total": 1, "in_a_row": 0}
    assert float(again.params["leader"]["w"]) == 0.5
    assert int(again.step) == 3


def test_after_too_many_in_a_row_nothing_moves_any_more():
    trainer = Trainer(toys.leader_and_follower(), TrainSettings(**SGD, max_skipped=2), seed=0)
    states = [state for state, _ in steps(trainer, [0.5, np.nan, np.nan, 0.5, 0.5])]
    assert [int(state.skipped["in_a_row"]) for state in states] == [0, 1, 2, 2, 2]
    assert {float(state.params["leader"]["w"]) for state in states} == {0.75}


@pytest.mark.parametrize("accumulate", [pytest.param(2, marks=pytest.mark.slow), 8])
def test_microbatches_equal_the_large_batch(accumulate):
    """The same examples with the same noise: losses and parameters agree within float32 reassociation."""
    runs = []
    for count in (1, accumulate):
        _, program, feed = toys.digits_run(toys.mesh(), accumulate=count, optimizer="sgd", learning_rate=0.1)
        state, outcome = program.advance(program.init(), feed.chunk(0, 4), jnp.int32(4), {})
        runs.append((state.params, float(outcome.sums["loss"][0])))
    assert runs[0][1] == pytest.approx(runs[1][1], rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6, rtol=1e-4), runs[0][0], runs[1][0])


def test_gradients_are_clipped_by_their_global_norm():
    """Adam hides the scale of a gradient, SGD does not: an update of rate 1 has exactly the norm clipped to."""
    transform = optimizer.build(TrainSettings(**{**SGD, "learning_rate": 1.0, "clip_norm": 0.125}))
    gradient = {"a": jnp.float32(3.0), "b": jnp.float32(-4.0)}
    update, _ = transform.update(gradient, transform.init(gradient))
    np.testing.assert_allclose([update["a"], update["b"]], [-0.125 * 3 / 5, 0.125 * 4 / 5], rtol=1e-6)


def test_learning_rates_by_optax_names():
    """Peak and length come from the settings; cosine at its middle is half of the peak; warm-up starts at 0."""
    train = TrainSettings(steps=100, learning_rate=0.2, learning_rate_schedule="cosine_decay_schedule")
    assert float(optimizer.learning_rate(train)(50)) == pytest.approx(0.1)
    train = TrainSettings(
        steps=100, learning_rate=0.2, learning_rate_schedule="warmup_cosine_decay_schedule(warmup_steps=10)"
    )
    rate = optimizer.learning_rate(train)
    assert [float(rate(step)) for step in (0, 5, 10, 100)] == pytest.approx([0.0, 0.1, 0.2, 0.0])
    linear = TrainSettings(
        steps=100, learning_rate=0.2, learning_rate_schedule="linear_schedule(end_value=0.0,transition_steps=10)"
    )
    assert float(optimizer.learning_rate(linear)(5)) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("optimizer", "adamm"),
        ("optimizer", "adamw(beta=1)"),
        ("optimizer", "adamw(b1='x')"),
        ("learning_rate_schedule", "cosine"),
        ("learning_rate_schedule", "cosine_decay_schedule(alpha_=1)"),
    ],
)
def test_unknown_optimizers_and_options_are_named(field, text):
    with pytest.raises(UserError, match=f"train.{field}"):
        optimizer.build(TrainSettings(**{field: text}))


def test_optimizers_are_those_of_optax():
    """Two steps of ours are two steps of optax's own."""
    train = TrainSettings(optimizer="adamw(b2=0.9,weight_decay=0.1)", learning_rate=0.01, clip_norm=0.0)
    params, gradient = {"w": jnp.array([1.0, -2.0])}, {"w": jnp.array([0.3, 0.1])}
    results = []
    with jax.numpy_dtype_promotion("standard"):
        for transform in (optimizer.build(train), optax.adamw(0.01, b2=0.9, weight_decay=0.1)):
            own, state = params, transform.init(params)
            for _ in range(2):
                change, state = transform.update(gradient, state, own)
                own = optax.apply_updates(own, change)
            results.append(own["w"])
    np.testing.assert_allclose(results[0], results[1], rtol=1e-6)
