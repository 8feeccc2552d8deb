"""What turns images into features: a classifier trained on labelled images, principal components of others."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffusion_jax import networks, rng
from diffusion_jax.data.source import ArraySource
from diffusion_jax.networks import Network
from diffusion_jax.types import Array, ImageSpec, Tree

VERSION = 1  # to be raised whenever anything here, or in networks/classifier.py, changes the features
EPOCHS, BATCH, MAX_STEPS = 40, 32, 4000
LEARNING_RATE, WEIGHT_DECAY = 2e-3, 1e-2
FEATURES = 64
COMPONENT_IMAGES = 2000  # that principal components are taken of


@dataclass(frozen=True, kw_only=True)
class Extractor:
    """A way to features that is still to be fitted.

    Attributes:
      name: for people, with the number of features.
      recipe: for the hash: with the images, it determines the features.
      weights: what `fit` returns, as shapes.
      fit: () -> NumPy weights, always the same.
      apply: (weights, u8[B,H,W,C]) -> features f32[B,D], logits f32[B,num_classes] or None.
    """

    name: str
    recipe: str
    weights: Tree
    fit: Callable[[], Tree]
    apply: Callable[[Tree, Array], tuple[Array, Array | None]]


def classifier(train: ArraySource, spec: ImageSpec) -> Extractor:
    """A classifier's last hidden layer, each feature standardised over the training images, u8[N,H,W,C] with labels.

    A feature that is hardly ever active is divided by a tenth of the median deviation instead of its own: otherwise
    one rare image would rule every distance.
    """
    network = networks.build_classifier(spec, FEATURES)
    steps = max(1, min(MAX_STEPS, EPOCHS * len(train) // BATCH))

    def apply(weights: Tree, x: Array) -> tuple[Array, Array]:
        logits, hidden = network.apply(weights["network"], _to_float(x))
        return (hidden - weights["mean"][None]) / weights["scale"][None], logits

    def fit() -> Tree:
        with jax.default_matmul_precision("highest"):
            params, hidden = jax.device_get(_train(network, steps)(*jax.device_put((train.image, train.label))))
        deviation = hidden.std(0)
        scale = np.maximum(deviation, 0.1 * np.median(deviation) + 1e-6)
        return {"network": params, "mean": hidden.mean(0), "scale": scale}

    vector = jax.ShapeDtypeStruct((FEATURES,), jnp.float32)
    abstract = {"network": jax.eval_shape(network.init, jax.random.key(0)), "mean": vector, "scale": vector}
    recipe = f"classifier {VERSION}: {steps} steps of {BATCH}, {LEARNING_RATE}, {WEIGHT_DECAY}"
    name = f"classifier of the training images, {FEATURES} features"
    return Extractor(name=name, recipe=recipe, weights=abstract, fit=fit, apply=apply)


def _train(network: Network, steps: int) -> Callable[[Array, Array], tuple[Tree, Array]]:
    """Jitted (u8[N,H,W,C], i32[N]) -> parameters after `steps` steps of AdamW on shifted images, hidden f32[N,D]."""
    schedule = optax.cosine_decay_schedule(LEARNING_RATE, steps)
    optimizer = optax.adamw(schedule, weight_decay=WEIGHT_DECAY)

    def loss(params: Tree, x: Array, label: Array) -> Array:
        logits, _ = network.apply(params, x)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, label))

    @jax.jit
    def train(images: Array, labels: Array) -> tuple[Tree, Array]:
        def step(carry: tuple[Tree, Tree], number: Array) -> tuple[tuple[Tree, Tree], None]:
            params, state = carry
            index = jax.random.randint(rng.stream(0, "batch", number), (BATCH,), 0, len(images))
            x = _shift(rng.stream(0, "shift", number), _to_float(images[index]))
            gradient = jax.grad(loss)(params, x, labels[index])
            with jax.numpy_dtype_promotion("standard"):  # optax raises a Python float to an integer power
                updates, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        params = network.init(rng.stream(0, "init"))
        (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(steps))
        return params, jax.lax.map(lambda x: network.apply(params, _to_float(x)[None])[1][0], images, batch_size=256)

    return train


def _shift(key: Array, x: Array) -> Array:
    """Each of f32[B,H,W,C] moved by up to an eighth of its side in both directions, the border filled with black."""
    most = max(1, x.shape[1] // 8)
    padded = jnp.pad(x, ((0, 0), (most, most), (most, most), (0, 0)), constant_values=-1.0)
    corner = jax.random.randint(key, (len(x), 2), 0, 2 * most + 1)
    return jax.vmap(lambda image, at: jax.lax.dynamic_slice(image, (at[0], at[1], 0), x.shape[1:]))(padded, corner)


def principal_components(images: np.ndarray) -> Extractor:
    """Up to 64 leading principal components of training images u8[N,H,W,C], N at least 2.

    They keep their scales relative to each other; together they have variance 1 a component.
    """
    count = min(FEATURES, len(images) - 1, images[0].size)

    def fit() -> Tree:
        x = images.reshape(len(images), -1).astype(np.float64) / 127.5 - 1.0
        mean = x.mean(0)
        _, values, axes = np.linalg.svd(x - mean, full_matrices=False)
        scale = np.sqrt(np.mean(values[:count] ** 2) / (len(x) - 1)) + 1e-6
        return {"mean": mean.astype(np.float32), "basis": (axes[:count].T / scale).astype(np.float32)}

    def apply(weights: Tree, x: Array) -> tuple[Array, None]:
        return (_to_float(x).reshape(len(x), -1) - weights["mean"][None]) @ weights["basis"], None

    abstract = {
        "mean": jax.ShapeDtypeStruct((images[0].size,), jnp.float32),
        "basis": jax.ShapeDtypeStruct((images[0].size, count), jnp.float32),
    }
    name = f"{count} principal components of the training images"
    return Extractor(name=name, recipe=f"components {VERSION}", weights=abstract, fit=fit, apply=apply)


def _to_float(x: Array) -> Array:
    """f32 in [-1,1] from u8."""
    return x.astype(jnp.float32) / 127.5 - 1.0
