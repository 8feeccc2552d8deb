"""Arrays that tests of several rooms begin with."""

import jax
import jax.numpy as jnp
import numpy as np


def normals(*shape, seed=0):
    """Standard normals f32[shape], the same for the same seed."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def filled(init, *arguments):
    """Parameters of the shapes that `init` makes, none of them 0: 1 / sqrt(n) for n inputs, vectors 0.3, about."""
    generator = np.random.default_rng(1)

    def draw(leaf):
        spread = 0.3 if leaf.ndim < 2 else np.prod(leaf.shape[:-1]) ** -0.5
        return np.asarray(spread * generator.normal(size=leaf.shape), leaf.dtype)

    return jax.tree.map(draw, jax.eval_shape(init, jax.random.key(0), *arguments))
