"""What every family promises to the trainer, the sampler and the evaluation, whichever rows it is put together from.

A new family joins by being registered; `VARIANTS` must then say how to build it small.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import families, rng, tree
from diffusion_jax.diffusion.prediction import PREDICTIONS
from diffusion_jax.diffusion.schedule import SCHEDULES
from diffusion_jax.errors import UserError
from diffusion_jax.families import FAMILIES
from diffusion_jax.settings import TrainSettings
from diffusion_jax.training.step import Trainer
from diffusion_jax.types import ImageSpec

LABELLED = ImageSpec(size=8, channels=1, num_classes=3)
PLAIN = ImageSpec(size=8, channels=1, num_classes=0)
DIT = "dit(patch=4,width=16,depth=1,heads=2)"
UNET = "unet(channels=32,multipliers=(1,),blocks=1,attention=())"


def row(name, spec=LABELLED, **fields):
    return {"name": name, **fields}, spec


def diffusion(schedule, prediction, spec=LABELLED, network=DIT, **fields):
    return row("diffusion", spec, network=network, schedule=schedule, prediction=prediction, **fields)


def _pairings():
    for schedule in SCHEDULES:
        for prediction in PREDICTIONS:
            section, spec = diffusion(schedule, prediction)
            try:
                families.build(section, spec, "float32")
            except UserError:
                continue
            yield f"diffusion-{schedule}-{prediction}", (section, spec)


PAIRINGS = dict(_pairings())
"""Every schedule with every prediction that goes with it."""

VARIANTS = {
    "diffusion": diffusion("rectified_flow", "velocity"),
    "diffusion-plain": diffusion("cosine", "v", PLAIN, weighting="min_snr", time_sampling="uniform"),
    "diffusion-edm": diffusion("edm", "edm", weighting="edm", time_sampling="log_normal"),
    "diffusion-unet": diffusion("vp_linear", "eps", network=UNET),
    "diffusion-dropout": diffusion("rectified_flow", "x0", network=DIT[:-1] + ",dropout=0.2)"),
}
"""A few of each family, for what costs a compilation."""


def test_every_family_has_its_variants():
    assert {section["name"] for section, _ in VARIANTS.values()} == set(FAMILIES)


@functools.cache
def family(name):
    section, spec = (PAIRINGS | VARIANTS)[name]
    return families.build(section, spec, "float32")


def batch(spec, count=4, seed=0):
    generator = np.random.default_rng(seed)
    images = {"image": jnp.asarray(generator.uniform(-1, 1, (count, *spec.shape)), jnp.float32)}
    label = {"label": jnp.arange(count, dtype=jnp.int32) % spec.num_classes} if spec.num_classes else {}
    return images | label | {"index": jnp.arange(count, dtype=jnp.int32)}


def keys(count, seed=0):
    return rng.example_keys(rng.stream(jax.random.key(seed), "sample"), jnp.arange(count))


def condition(spec, count, label=None):
    if not spec.num_classes:
        return {}
    return {"label": jnp.full(count, label) if label is not None else jnp.arange(count) % spec.num_classes}


def own_defaults(name, **changes):
    """The family's `sample` section at its defaults."""
    return families.default_fields(name.split("-")[0])[1] | changes


class Counted:
    """A compiled function that knows how often it was traced."""

    def __init__(self, function):
        self.traces = 0

        def counting(*args):
            self.traces += 1
            return function(*args)

        self.program = jax.jit(counting)

    def __call__(self, *args):
        return self.program(*args)


@functools.cache
def trainer(name):
    it = Trainer(family(name), TrainSettings(learning_rate=1e-2, batch_size=4), seed=0)
    return it, Counted(it.step)


@functools.cache
def weights(name):
    """Parameters at random: at initialisation many outputs are 0."""
    params, _ = jax.jit(family(name).init)(jax.random.key(0))
    leaves, structure = jax.tree.flatten(params)
    noise = jax.random.split(jax.random.key(1), len(leaves))
    moved = [leaf + 0.2 * jax.random.normal(key, leaf.shape) for key, leaf in zip(noise, leaves, strict=True)]
    return jax.tree.unflatten(structure, moved)


@functools.cache
def generate(name):
    return Counted(family(name).generate)


# ------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("name", VARIANTS)
def test_one_step_of_training(name):
    """The loss is finite, every parameter that can move does, and a second step does not trace again."""
    spec = VARIANTS[name][1]
    it, step = trainer(name)
    state = jax.jit(it.init)()
    first, metrics = step(state, batch(spec), {})
    second, _ = step(first, batch(spec, seed=1), {})
    assert step.traces == 1
    for key, value in metrics.items():
        assert np.isfinite(value), key
    assert int(second.step) == 2
    assert int(second.skipped["total"]) == 0
    for player in family(name).players:
        assert not tree_equal(state.params[player.name], first.params[player.name])
        still = [
            tree.path_name(path)
            for (path, a), b in zip(
                jax.tree_util.tree_leaves_with_path(state.params[player.name]),
                jax.tree.leaves(third(it, step, second, spec).params[player.name]),
                strict=True,
            )
            if np.array_equal(a, b)
        ]
        assert not still


def third(it, step, state, spec):
    """Zero-initialised gates open in the first step; what stands behind them moves from the second on."""
    return step(step(state, batch(spec, seed=2), {})[0], batch(spec, seed=3), {})[0]


def tree_equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.parametrize("name", PAIRINGS)
def test_loss_and_gradient_are_finite(name):
    """For every pairing of rows, with parameters at random; eagerly traced players, one program each."""
    spec, state = PAIRINGS[name][1], trainer(name)[0].init()
    state = state.__class__(**{**state.__dict__, "params": dict(weights(name))})
    it = trainer(name)[0]
    player = family(name).players[0]
    loss, _, gradient = jax.jit(lambda s, b: it.gradient(player, s, b, {}))(state, batch(spec))
    assert np.isfinite(loss)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))
