"""Images are discrete: each number is one of `levels` equidistant grey levels, -1, -1 + step, ..., 1."""

import math

import jax
import jax.numpy as jnp

from diffusion_jax import rng
from diffusion_jax.types import Array


def step(levels: int) -> float:
    """The distance of two neighbouring grey levels."""
    return 2.0 / (levels - 1)


def index(image: Array, levels: int) -> Array:
    """The nearest level's number i32 in [0, levels) of each number of an image."""
    return jnp.clip(jnp.round((image + 1.0) / step(levels)), 0, levels - 1).astype(jnp.int32)


def dequantise(image: Array, keys: Array, levels: int) -> Array:
    """Images f[n,H,W,C] made continuous by uniform noise of key[n]: the levels' cells touch and do not overlap."""
    u = rng.draw(keys, lambda key: jax.random.uniform(key, image.shape[1:], image.dtype, -0.5, 0.5))
    return image + step(levels) * u


def bits_per_dimension(nats: Array, dimensions: int) -> Array:
    """Nats an image as bits a dimension."""
    return nats / (dimensions * math.log(2.0))
