"""Vector quantisation (van den Oord et al. 2017): a learned codebook of K vectors, of which each place has one.

    token = argmin_k |y - e_k|^2,  z = e_token                                      eq. 1 and 2; dz/dy = 1
    loss  = |sg[y] - z|^2 + beta |y - sg[z]|^2                                      eq. 3, without the reconstruction

sg stops gradients, and |.|^2 is a mean over the numbers of an image's places. The first term moves the codebook; with
`codebook="ema"` it is left out, and running means move it: see `codebook.py`.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from diffusion_jax.tokenizers.bottlenecks import codes
from diffusion_jax.tokenizers.bottlenecks.base import Passed
from diffusion_jax.tokenizers.bottlenecks.codebook import Codebook
from diffusion_jax.types import Array, Tree


@dataclass(frozen=True, kw_only=True)
class VQ(Codebook):
    """See above; a row of `BOTTLENECKS`, with the options of `Codebook`."""

    def encode(self, params: Tree, y: Array, keys: Array | None) -> Array:
        """See `Bottleneck`."""
        return self.token(params, y)

    def decode(self, params: Tree, given: Array) -> Array:
        """See `Bottleneck`."""
        return self.vector(params, given)

    def nearest(self, params: Tree, z: Array) -> Array:
        """See `Bottleneck`."""
        return self.decode(params, self.encode(params, z, None))

    def train(self, params: Tree, extra: Tree, y: Array, keys: Array, step: Array) -> Passed:
        """See `Bottleneck`."""
        tokens = self.encode(params, jax.lax.stop_gradient(y), keys)
        z = self.decode(params, tokens)
        fixed = jax.lax.stop_gradient
        apart = lambda a, b: jnp.mean(jnp.square(a - b), axis=(1, 2, 3))
        loss = self.beta * apart(y, fixed(z))
        if self.codebook == "gradient":
            loss = loss + apart(fixed(y), z)
        extra = fixed(self.remembered(self.begun(extra, step), tokens, y, keys, step))
        return Passed(z=codes.straight_through(y, z), loss=loss, metrics=codes.metrics(extra["usage"]), extra=extra)
