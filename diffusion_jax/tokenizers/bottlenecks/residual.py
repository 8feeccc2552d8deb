"""Multi-scale residual quantisation (Tian et al. 2024, section 3.2): tokens of K scales, one codebook for all of them.

    r_k = nearest codes of area(y - f^_(k-1), h_k)
    f^_k = f^_(k-1) + phi_k(bicubic(e_(r_k), h_K))                                  Algorithms 1 and 2; z = f^_K
    phi_k(h) = h / 2 + (w_s * h + b_s) / 2                                          3x3, s one of S for all K scales
    loss = 1/K sum_k (|sg[y] - f^_k|^2 + beta |y - sg[f^_k]|^2)

dz/dy = 1. The first term moves codebook and phi; with `codebook="ema"` it moves phi alone. The loss of the paper's
eq. 5 has the last scale's errors alone; a mean over scales is what its published code trains by, and so are the
halves in phi and the scales that share one.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import rng
from diffusion_jax.networks import layers
from diffusion_jax.networks.convolution import convolve
from diffusion_jax.tokenizers import scales
from diffusion_jax.tokenizers.bottlenecks import codes
from diffusion_jax.tokenizers.bottlenecks.base import Passed
from diffusion_jax.tokenizers.bottlenecks.codebook import Codebook
from diffusion_jax.tokenizers.scales import Scales
from diffusion_jax.types import Array, Tree


@dataclass(frozen=True, kw_only=True)
class Residual(Codebook):
    """See above; a row of `BOTTLENECKS`, with the options of `Codebook`. The defaults are those of the paper.

    Attributes:
      scales: h_1, ..., h_K, from 1 to the grid's.
      convolutions: S.
    """

    codes: int = 4096
    latents: int = 32
    scales: tuple = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    convolutions: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        scales.check(self.scales)
        if self.convolutions < 1:
            raise ValueError(f"convolutions must be at least 1, not {self.convolutions}")

    def init(self, key: Array) -> tuple[Tree, Tree]:
        """See `Bottleneck`."""
        params, extra = super().init(key)
        shape = (3, 3, self.latents, self.latents)
        draw = lambda key: layers.UNIFORM(key, shape)
        kernels = jax.vmap(draw)(jax.random.split(rng.stream(key, "phi"), self.convolutions))
        phi = {"kernel": kernels, "bias": jnp.zeros((self.convolutions, self.latents))}
        return params | {"phi": phi}, extra

    # ------------------------------------------------------------------------------------------ there and back

    @property
    def multiscale(self) -> Scales:
        """What becomes of the tokens, scale by scale."""
        return Scales(sides=self.scales, channels=self.latents, token=self.token, vectors=self.vectors)

    def vectors(self, params: Tree, tokens: Array, k: int) -> Array:
        """phi_k(bicubic(e_(r_k), h_K)) f32[B,h_K,h_K,latents] of tokens i32[B,h_k,h_k]."""
        h = scales.bicubic(self.vector(params, tokens), self.scales[-1])
        s = self.convolution_of(k)
        y = convolve(h, params["phi"]["kernel"][s], padding=1) + codes.along_last(params["phi"]["bias"][s], h.ndim)
        return 0.5 * h + 0.5 * y

    def convolution_of(self, k: int) -> int:
        """The number of the convolution of scale k: the one whose place in [0, 1] is nearest to k / (K - 1).

        Places are the middles of S equal parts, but for S = 4, where the published code has 1/12, 13/36, 23/36, 11/12.
        """
        S = self.convolutions
        margin = 1.0 / (3.0 * S) if S == 4 else 1.0 / (2.0 * S)
        places = np.linspace(margin, 1.0 - margin, S)
        return int(np.argmin(np.abs(places - k / (len(self.scales) - 1))))

    def encode(self, params: Tree, y: Array, keys: Array | None) -> Array:
        """Tokens i32[B,L] of y f32[B,h,w,latents]."""
        return self.multiscale.bound(params).encode(y)[0]

    def decode(self, params: Tree, given: Array) -> Array:
        """See `Bottleneck`; of tokens i32[B,L]."""
        return self.multiscale.bound(params).stages(given)[-1]

    def nearest(self, params: Tree, z: Array) -> Array:
        """See `Bottleneck`."""
        return self.decode(params, self.encode(params, z, None))

    # ------------------------------------------------------------------------------------------ training

    def train(self, params: Tree, extra: Tree, y: Array, keys: Array, step: Array) -> Passed:
        """See `Bottleneck`."""
        fixed = jax.lax.stop_gradient
        tokens, residuals = self.multiscale.bound(fixed(params)).encode(fixed(y))
        followed = params if self.codebook == "gradient" else params | {"codebook": fixed(params["codebook"])}
        stages = jnp.stack(self.multiscale.bound(followed).stages(tokens))
        apart = lambda a, b: jnp.mean(jnp.square(a[None] - b), axis=(0, 2, 3, 4))
        loss = apart(fixed(y), stages) + self.beta * apart(y, fixed(stages))
        extra = fixed(self.remembered(self.begun(extra, step), tokens, residuals, keys, step))
        z = codes.straight_through(y, stages[-1])
        return Passed(z=z, loss=loss, metrics=codes.metrics(extra["usage"]), extra=extra)
