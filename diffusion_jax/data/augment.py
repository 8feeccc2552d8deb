"""Changes of training images that leave what they show as it is; inside the compiled step, one draw an example."""

import jax
import jax.numpy as jnp

from diffusion_jax import rng
from diffusion_jax.types import Array, Batch


def flip(batch: Batch, key: Array) -> Batch:
    """Mirror each image left to right with probability 1/2.

    Args:
      batch: `image` [B,H,W,C] of any type, `index` i32[B], whatever else.
      key: of this step.
    """
    keys = rng.example_keys(key, batch["index"])
    mirrored = rng.draw(keys, lambda key: jax.random.bernoulli(key))
    image = batch["image"]
    return {**batch, "image": jnp.where(mirrored[:, None, None, None], image[:, :, ::-1], image)}
