"""A hierarchical autoencoder: levels of latents from coarse to fine, each given all above it.

A ladder (Sønderby et al. 2016): the image is read upwards, once; prior and posterior of the latents are made on one way
down, from what stands above and, for the posterior, from what was read on the way up. The levels are those of the very
deep VAE (Child 2021, figure 3), and a posterior says how it differs from the prior (Vahdat & Kautz 2020, section 3.2).
"""

from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp

from diffusion_jax.networks import layers
from diffusion_jax.networks.layers import Conv
from diffusion_jax.networks.vae.blocks import Block, Encoder, Inferred, Out, Start, Up, bounded, check_sizes, widths
from diffusion_jax.types import Array


@dataclass(frozen=True, kw_only=True)
class LadderOptions:
    """Sizes of a ladder.

    Attributes:
      channels: at the image's own resolution.
      multipliers: of `channels` at each resolution; every further one halves the image's side.
      blocks: residual blocks a resolution on the way up.
      levels: levels of latents at each resolution on the way down, as many numbers as `multipliers`.
      latents: channels of a level's latents.
    """

    channels: int = 32
    multipliers: tuple = (1, 2, 2)
    blocks: int = 1
    levels: tuple = (1, 1, 1)
    latents: int = 8

    def __post_init__(self) -> None:
        check_sizes(self)
        whole = all(isinstance(count, int) and count >= 0 for count in self.levels)
        if not whole or len(self.levels) != len(self.multipliers) or not any(self.levels):
            raise ValueError(f"levels must be a whole number for each multiplier, not all of them 0, not {self.levels}")
        if self.latents < 1:
            raise ValueError(f"latents must be at least 1, not {self.latents}")


class Ladder(nn.Module):
    """Up once, then down level by level."""

    options: LadderOptions
    size: int
    channels_out: int
    num_classes: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array | None, label: Array | None, eps: Array) -> Inferred:
        """See `networks.vae.Autoencoder`: `infer`, or `decode` where x is None."""
        o, features = self.options, widths(self.options)
        read = [None] * len(features)
        if x is not None:
            read = Encoder(o, self.num_classes, self.dtype, name="encoder")(x, label)
        side = self.size >> (len(features) - 1)
        y = Start(side, features[-1], self.num_classes, self.dtype, name="start")(len(eps), label)
        means, log_stds, used = [], [], 0
        for i, width in reversed(list(enumerate(features))):
            if i < len(features) - 1:
                y = Up(width, self.dtype, name=f"up_{i}")(y)
            for j in range(o.levels[i]):
                shape = (*y.shape[:3], o.latents)
                own = eps[:, used : used + _numbers(shape)].reshape(shape)
                y, mean, log_std = Level(o.latents, self.dtype, name=f"level_{i}_{j}")(y, read[i], own)
                means, log_stds, used = [*means, mean], [*log_stds, log_std], used + _numbers(shape)
        pixels = Out(self.channels_out, name="out")(y)
        return Inferred(None, None, pixels) if x is None else Inferred(_joined(means), _joined(log_stds), pixels)


class Level(nn.Module):
    """One level's latents, made from y, which holds all levels above, and put into it.

        p(z | above)    = N(mu, sigma^2)                             mu, sigma from y
        q(z | above, x) = N(mu + sigma m, (sigma s)^2)               m, s from y and what was read of x

    So z = mu + sigma noise, where the noise is N(0, 1) under p and N(m, s^2) under q: the paper's residual posterior,
    with its change of the mean in units of sigma. m = 0 and s = 1, as it begins, is the prior.
    """

    latents: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, y: Array, read: Array | None, eps: Array) -> tuple[Array, Array | None, Array | None]:
        """[B,H,W,C], the same or None without an image, f32[B,H,W,latents] -> y, m, log s, the latter None without."""
        C = y.shape[-1]
        m = log_s = None
        noise = eps
        if read is not None:
            both = Conv(C, size=1, dtype=self.dtype, name="join")(jnp.concatenate([y, read], axis=-1))
            q = Out(2 * self.latents, layers.ZEROS, name="posterior")(Block(self.dtype, name="posterior_block")(both))
            m, log_s = jnp.split(q, 2, axis=-1)
            log_s = bounded(log_s)
            noise = m + jnp.exp(log_s) * eps
        p = Out(2 * self.latents + C, layers.ZEROS, name="prior")(Block(self.dtype, name="prior_block")(y))
        mu, log_sigma, feature = jnp.split(p, (self.latents, 2 * self.latents), axis=-1)
        z = mu + jnp.exp(bounded(log_sigma)) * noise
        y = y + feature.astype(self.dtype) + Conv(C, size=1, dtype=self.dtype, name="latents")(z)
        return Block(self.dtype, name="block")(y), m, log_s


def _numbers(shape: tuple[int, ...]) -> int:
    """How many numbers an example has in an array of `shape` (B,H,W,C)."""
    return shape[1] * shape[2] * shape[3]


def _joined(levels: list[Array]) -> Array:
    """[B,H,W,C] of each level -> [B,D]."""
    return jnp.concatenate([level.reshape(len(level), -1) for level in levels], axis=-1)


def level_sizes(options: LadderOptions, size: int) -> tuple[int, ...]:
    """How many latents each level has, from the coarsest to the finest."""
    sides = [size >> i for i in range(len(options.levels))]
    return tuple(
        side * side * options.latents
        for side, count in reversed(list(zip(sides, options.levels, strict=True)))
        for _ in range(count)
    )
