"""Our side of a race. It also makes the weights and inputs that the other side reads."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.racers import Task, race
from diffusion_jax import networks, rng
from diffusion_jax.networks.presets import PRESETS
from diffusion_jax.types import Array, Tree


def prepare(task: Task) -> tuple[Callable[[], None], dict[str, Any]]:
    """See `racers.Prepare`."""
    preset = PRESETS[task.network]
    network = networks.build("network", task.network, preset.image, task.dtype, preset.channels_out)
    given = inputs(task)
    params = jax.jit(lambda: shaken(network.init(jax.random.key(0))))()
    about = {"jax": jax.__version__}
    x, label = jnp.asarray(given["x"]), None if given["label"] is None else jnp.asarray(given["label"])
    if task.what == "train":
        return training(network, params, x, jnp.asarray(given["time"]), label, jnp.asarray(given["target"])), about

    folder = Path(task.folder)
    (folder / "params.pickle").write_bytes(pickle.dumps(jax.tree.map(np.asarray, params)))
    time = jnp.asarray(given["time"][:1])  # a sampler's images are all at one time
    params = jax.jit(network.prepare)(params)  # once, before a sampler's loop
    forward = jax.jit(network.apply).lower(params, x, time, label).compile()
    np.save(folder / "ours.npy", np.asarray(forward(params, x, time, label)))
    return lambda: jax.block_until_ready(forward(params, x, time, label)), about


def inputs(task: Task) -> dict[str, Any]:
    """Images, times, labels and targets; read by both sides."""
    preset, generator = PRESETS[task.network], np.random.default_rng(0)
    shape, classes = (task.batch, preset.image.size, preset.image.size), preset.image.num_classes
    given = {
        "x": generator.normal(size=(*shape, preset.image.channels)).astype(np.float32),
        "time": np.full(task.batch, 0.3, np.float32),
        "label": np.arange(task.batch, dtype=np.int32) % classes if classes else None,
        "target": generator.normal(size=(*shape, preset.channels_out)).astype(np.float32),
    }
    Path(task.folder, "inputs.pickle").write_bytes(pickle.dumps(given))
    return given


def shaken(params: Tree) -> Tree:
    """Parameters of which none is zero, so that no part of the network is idle."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [leaf + 0.02 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, moved)


def training(
    network: networks.Network, params: Tree, x: Array, time: Array, label: Array | None, target: Array
) -> Callable[[], None]:
    """One step, whose state is donated."""
    optimizer = optax.adamw(1e-4)

    def step(state: tuple[Tree, Tree, Array]) -> tuple[Tree, Tree, Array]:
        params, opt_state, count = state
        keys = rng.example_keys(rng.stream(0, "dropout", count), jnp.arange(len(x)))
        loss = lambda params: jnp.mean(jnp.square(network.apply(params, x, time, label, keys) - target))
        change, opt_state = optimizer.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, change), opt_state, count + 1

    state = (params, jax.jit(optimizer.init)(params), jnp.int32(0))
    advance = jax.jit(step, donate_argnums=0).lower(state).compile()

    def act() -> None:
        nonlocal state
        state = jax.block_until_ready(advance(state))

    return act


if __name__ == "__main__":
    race(prepare)
