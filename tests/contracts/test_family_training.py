"""What every family promises to the trainer: one step, compiled once, in which each player moves by its own loss alone;
the same on any number of devices, in any number of microbatches and after any interruption; averages by their formula.

All runs are of four steps on images of noise, eight a batch, and begin with the same parameters.
"""

import functools
from dataclasses import fields, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from diffusion_jax import tree
from diffusion_jax.data.feed import resident
from diffusion_jax.data.source import ArraySource
from diffusion_jax.settings import CheckpointSettings, MeshSettings, TrainSettings
from diffusion_jax.training import sharding
from diffusion_jax.training.checkpoint import Checkpoints
from diffusion_jax.training.loop import compile_program
from diffusion_jax.training.step import Trainer
from diffusion_jax.types import TrainState
from tests.contracts.families import TRAINED, VARIANTS, family, frozen, noise, smallest
from tests.training.toys import mesh

STEPS = 4
TRAIN = {
    "batch_size": 8,
    "log_every": STEPS,
    "steps": STEPS,
    "learning_rate": 1e-2,
    "optimizer": "adam(eps=0.001)",  # so much that where a gradient is next to nothing, rounding does not decide
}
PROFILES = {"fixed": "constant(decay=0.75)", "warm": "warmup(decay=0.3)", "narrow": "power(std=0.1)"}


def profile(name):
    """Of `PROFILES` one a variant, in turn: each takes time to compile."""
    return tuple(PROFILES)[TRAINED.index(name) % len(PROFILES)]


pytestmark = pytest.mark.usefixtures("quick_compilation")


def audible(it):
    """The family with each player's loss times a number of that name in `frozen`: 1 leaves it, 0 silences it."""

    def times(player):
        def loss(params, ctx):
            value, aux = player.loss(params, ctx)
            return ctx.frozen[player.name] * value, aux

        return replace(player, loss=loss)

    return replace(it, players=tuple(times(player) for player in it.players))


@functools.cache
def program(name, ways=1, accumulate=1, precision="float32"):
    """(program, feed) over `ways` devices."""
    spec = VARIANTS[name].spec
    label = np.arange(24, dtype=np.int32) % spec.num_classes if spec.num_classes else None
    rows = NamedSharding(mesh(ways), sharding.BATCH)
    feed = resident(ArraySource(image=noise(spec, 24), label=label), TRAIN["batch_size"], 0, rows, capacity=STEPS)
    settings = TrainSettings(**TRAIN, accumulate=accumulate, ema={profile(name): PROFILES[profile(name)]})
    trainer = Trainer(audible(family(name, precision)), settings, seed=0)
    return compile_program(trainer, feed, rows.mesh, MeshSettings()), feed


def host(state):
    """A copy that no later step overwrites."""
    return jax.tree.map(np.array, jax.device_get(state))


def advance(name, state, count, silent=(), **how):
    """The state on the host, and the metrics as (sum, how many), after `count` more steps."""
    run, feed = program(name, **how)
    place = lambda leaf, like: jax.device_put(np.array(leaf), like.sharding)
    heard = {player.name: jnp.float32(player.name not in silent) for player in family(name).players}
    chunk = feed.chunk(int(state.step), count)
    state, outcome = run.advance(
        jax.tree.map(place, state, run.abstract), chunk, jnp.int32(count), heard | frozen(name)
    )
    return host(state), jax.device_get(outcome.sums)


@functools.cache
def course(name):
    """The states after 0, 1, ... steps on one device, and the metrics of each step."""
    states, metrics = [host(program(name)[0].init())], []
    for _ in range(STEPS):
        state, seen = advance(name, states[-1], 1)
        states, metrics = [*states, state], [*metrics, seen]
    return states, metrics


def leaves(state):
    """{path: leaf}."""
    return {tree.path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(state)}


def moved(old, new):
    """The paths of all leaves, and of those that differ."""
    old, new = leaves(old), leaves(new)
    return set(old), {path for path in old if not np.array_equal(old[path], new[path])}


# ------------------------------------------------------------------------------------------ one step


@pytest.mark.parametrize("name", smallest(TRAINED))
def test_training(name):
    """All that is measured is finite, every parameter and its averages move, and one compilation is enough.

    Gates that start at 0 open in the first step; what stands behind them moves from the second on.
    """
    states, metrics = course(name)
    begin, end = states[0], states[-1]
    for step, seen in enumerate(metrics):
        resting = {player.name for player in family(name).players if step % player.every or step < player.start}
        assert seen
        for metric, (_, finite) in seen.items():
            assert finite == (metric.split("/")[0] not in resting), (step, metric)
    assert (int(end.step), int(end.skipped["total"])) == (STEPS, 0)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((end.params, end.ema)))
    for old, new in ((begin.params, end.params), (begin.ema[profile(name)], end.ema[profile(name)])):
        every, changed = moved(old, new)
        assert changed == every
    assert program(name)[0].advance._cache_size() == 1


@pytest.mark.parametrize("name", smallest(TRAINED))
def test_each_player_moves_by_its_own_loss_alone(name):
    """While the others' losses are silent the others stay, bit by bit; without any loss everything does.

    But for what follows no loss at all, such as a codebook of running means.
    """
    states, _ = course(name)
    begin = replace(states[-1], opt_state=states[0].opt_state)  # without momentum, in a step that is everyone's turn
    names = [player.name for player in family(name).players]
    for alone in (*names, None):
        state, _ = advance(name, begin, 1, silent=[other for other in names if other != alone])
        for player in names:
            every, changed = moved(begin.params[player], state.params[player])
            settled = VARIANTS[name].settled.get(player, set())
            assert changed == (every if player == alone else settled), (alone, player)
    assert program(name)[0].advance._cache_size() == 1


# ------------------------------------------------------------------------------------------ averages

DECAYS = {
    "fixed": lambda n: 0.75,
    "warm": lambda n: min(0.3, (1 + n) / (10 + n)),
    "narrow": lambda n: (1 - 1 / n) ** (6.937 + 1),  # Karras et al. 2024, section 3.1: gamma of a width of 10 %
}


@pytest.mark.parametrize("name", smallest(TRAINED))
def test_averages_follow_their_formulas(name):
    """e <- d e + (1 - d) p, in NumPy from the parameters after each step."""
    states, _ = course(name)
    expected, decay = jax.tree.map(np.float64, states[0].params), DECAYS[profile(name)]
    for n, state in enumerate(states[1:], start=1):
        towards = lambda e, p, d: d * e + (1 - d) * p
        expected = jax.tree.map(functools.partial(towards, d=decay(n)), expected, state.params)
        close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
        jax.tree.map(close, state.ema[profile(name)], expected)


# ------------------------------------------------------------------------------------------ interruptions


@pytest.mark.parametrize("name", smallest(TRAINED))
def test_what_is_taken_up_again_ends_bit_by_bit_alike(name, tmp_path):
    """The checkpoint holds the whole state: what was drawn, averaged, counted, and every player's optimizer."""
    states, _ = course(name)
    run, _ = program(name)
    place = lambda leaf, like: jax.device_put(np.array(leaf), like.sharding)
    writing = Checkpoints(tmp_path, CheckpointSettings())
    writing.save(jax.tree.map(place, states[2], run.abstract), 2, {})
    writing.close()
    reading = Checkpoints(tmp_path)
    restored = reading.restore(run.abstract, 2)
    reading.close()
    assert set(leaves(vars(restored))) == set(leaves(vars(states[2])))
    assert {field.name for field in fields(TrainState)} == set(vars(restored))
    for player in family(name).players:
        assert moved(states[0].opt_state[player.name], restored.opt_state[player.name])[1]
    jax.tree.map(np.testing.assert_array_equal, restored, states[2])
    state, _ = advance(name, restored, STEPS - 2)
    jax.tree.map(np.testing.assert_array_equal, state, states[-1])


# ------------------------------------------------------------------------------------------ devices, batches, precision


def check_alike(state, expected, begin):
    """But for the order of sums in float32: to a thousandth of how far the player's parameters have come."""
    for player, params in expected.params.items():
        far = max(
            np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (params, begin.params[player])), strict=True)
        )
        close = functools.partial(np.testing.assert_allclose, rtol=0.0, atol=1e-3 * far)
        jax.tree.map(close, state.params[player], params)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-3), state.extra, expected.extra)


@pytest.mark.parametrize("name", smallest(TRAINED))
def test_eight_devices_agree_with_one(name):
    """The same examples with the same noise, one on each of eight devices."""
    states, _ = course(name)
    begin = host(program(name, ways=8)[0].init())
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), begin.params, states[0].params)
    check_alike(advance(name, begin, STEPS, ways=8)[0], states[-1], states[0])


@pytest.mark.parametrize("name", smallest(TRAINED))
def test_microbatches_equal_the_large_batch(name):
    """Also in what changes without gradient."""
    states, _ = course(name)
    check_alike(advance(name, states[0], STEPS, accumulate=2)[0], states[-1], states[0])


@pytest.fixture
def promotion_of_jax_attention():
    """jax.nn.dot_product_attention and its gradient mix bfloat16 with float32, which strictness forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.usefixtures("promotion_of_jax_attention")
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in ("diffusion", "gan-plain") else pytest.mark.slow) for n in TRAINED]
)
def test_bfloat16_trains(name):
    """The losses of the first step are those of float32 to 5 %, and every parameter moves and stays float32."""
    states, metrics = course(name)
    state, seen = advance(name, states[0], 1, precision="bfloat16")
    for metric, (value, _) in seen.items():
        if metric.endswith("loss"):
            np.testing.assert_allclose(value, metrics[0][metric][0], rtol=0.05, err_msg=metric)
    state, _ = advance(name, state, STEPS - 1, precision="bfloat16")
    assert int(state.skipped["total"]) == 0
    every, changed = moved(states[0].params, state.params)
    assert changed == every
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {np.dtype("float32")}
