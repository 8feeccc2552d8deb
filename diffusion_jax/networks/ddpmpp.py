"""DDPM++ and NCSN++ (Song et al. 2021, appendix H), in the form that EDM trains (Karras et al. 2022, appendix F).

Both are U-Nets whose every sum of two branches is divided by sqrt(2), and they differ in four options:

             embedding     noise_multiplier   encoder      resample
    DDPM++   positional    1                  standard     (1, 1)
    NCSN++   fourier       2                  residual     (1, 3, 3, 1)
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.networks import attention, layers, remat, unet
from diffusion_jax.networks.layers import Conv, Dense, GroupNorm
from diffusion_jax.types import Array

SQRT_HALF = 0.5**0.5
"""Times the sum of two branches: it keeps the variance of independent ones."""

TINY = nn.initializers.variance_scaling(1e-10, "fan_avg", "uniform")
"""Xavier's weights times 1e-5, of the last layer of each branch and of the network, which begin next to nothing."""

SMALLER = nn.initializers.variance_scaling(0.2, "fan_avg", "uniform")
"""Xavier's weights times sqrt(0.2), of queries, keys and values."""


@dataclass(frozen=True, kw_only=True)
class DDPMPPOptions:
    """Sizes and forms. The defaults are EDM's DDPM++ for CIFAR-10, without augmentation conditioning.

    Attributes:
      channels: at the first resolution; a multiple of 32, the number of groups of the norms.
      multipliers: of `channels` at each resolution; every further one halves the image's side.
      blocks: residual blocks a resolution on the way down; one more on the way up.
      attention: sides, in pixels, at which blocks are followed by attention: each on the way down, the last on the
        way up.
      dropout: probability inside the residual blocks.
      augment: width of the augmentation's label, which is an input then; 0 for none.
      embedding: of the time, "positional" or "fourier".
      noise_multiplier: width of that embedding over `channels`.
      encoder: "residual" adds, at each resolution, what convolutions alone make of the image; "standard" does not.
      resample: the filter, along one axis, with which images are halved and doubled; symmetric, of even length.
      time_scale: the embedding sees `time_scale` * time: 1 for EDM's ln(sigma) / 4, with which these networks were
        published; 1000, with the positional embedding, for the steps of DDPM from a time in [0, 1].
      attention_implementation: from `attention.IMPLEMENTATIONS`, or "auto".
      remat: from `remat.POLICIES`, what the backward pass keeps of each block.
    """

    channels: int = 128
    multipliers: tuple = (2, 2, 2)
    blocks: int = 4
    attention: tuple = (16,)
    dropout: float = 0.13
    augment: int = 0
    embedding: str = "positional"
    noise_multiplier: int = 1
    encoder: str = "standard"
    resample: tuple = (1, 1)
    time_scale: float = 1.0
    attention_implementation: str = "auto"
    remat: str = "none"

    def __post_init__(self) -> None:
        unet.check_sizes(self)
        unet.check_multipliers(self.multipliers)
        if self.augment < 0 or self.noise_multiplier < 1:
            raise ValueError("augment must be at least 0, and noise_multiplier at least 1")
        for name, choices in {"embedding": EMBEDDINGS, "encoder": ("standard", "residual")}.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be {' or '.join(choices)}, not {getattr(self, name)!r}")
        taps = self.resample
        if not taps or len(taps) % 2 or taps != taps[::-1] or not sum(taps) > 0:
            raise ValueError(f"resample must be symmetric, of even length and positive sum, not {taps}")
        if not 0.0 < self.time_scale < float("inf"):
            raise ValueError(f"time_scale must be positive, not {self.time_scale}")


class DDPMPP(nn.Module):
    """Down, middle, up."""

    options: DDPMPPOptions
    channels_out: int
    num_classes: int  # 0: no label; the label `num_classes` itself stands for "none"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Array, time: Array, label: Array | None, keys: Array | None, augment: Array | None = None
    ) -> Array:
        """See `networks.Network.apply`."""
        o = self.options
        condition = self.condition(time, label, augment)
        layer = itertools.count()
        halve, double = partial(halved, taps=o.resample), partial(doubled, taps=o.resample)
        residual_block, attention_block = remat.block(ResidualBlock, o.remat), remat.block(Attention, o.remat)

        def residual(x: Array, features: int, name: str, resize: Callable[[Array], Array] | None = None) -> Array:
            block = residual_block(features, o.dropout, next(layer), self.dtype, resize, name=name)
            return block(x, condition, keys)

        def attend(x: Array, name: str) -> Array:
            return attention_block(o.attention_implementation, self.dtype, name=f"{name}_attention")(x)

        image = x
        x = Conv(o.channels, dtype=self.dtype, name="in")(x)
        skips = [x]
        for level, multiplier in enumerate(o.multipliers):
            if level:
                x = residual(x, x.shape[-1], f"down_{level}", halve)
                if o.encoder == "residual":
                    image = HalvingConv(x.shape[-1], o.resample, self.dtype, name=f"image_{level}")(image)
                    x = image = SQRT_HALF * (x + image)
                skips.append(x)
            for i in range(o.blocks):
                x = residual(x, multiplier * o.channels, f"down_{level}_{i}")
                if x.shape[1] in o.attention:
                    x = attend(x, f"down_{level}_{i}")
                skips.append(x)

        x = residual(x, x.shape[-1], "middle_0")
        x = residual(attend(x, "middle"), x.shape[-1], "middle_1")

        for level, multiplier in reversed(list(enumerate(o.multipliers))):
            for i in range(o.blocks + 1):
                x = residual(jnp.concatenate([x, skips.pop()], axis=-1), multiplier * o.channels, f"up_{level}_{i}")
            if x.shape[1] in o.attention:
                x = attend(x, f"up_{level}")
            if level:
                x = residual(x, x.shape[-1], f"up_{level}", double)

        x = nn.silu(GroupNorm(name="out_norm")(x))
        return Conv(self.channels_out, dtype=jnp.float32, kernel_init=TINY, name="out")(x)

    def condition(self, time: Array, label: Array | None, augment: Array | None) -> Array:
        """The embedding of time, label and augmentation, [B or 1, 4 channels], past its last nonlinearity."""
        o = self.options
        width, embedded = 4 * o.channels, o.noise_multiplier * o.channels
        y = EMBEDDINGS[o.embedding](o.time_scale * time, embedded).astype(self.dtype)
        if self.num_classes:
            one_hot = self.num_classes**0.5 * jax.nn.one_hot(label, self.num_classes)  # zeros for "none"
            y = y + Dense(embedded, self.dtype, name="label")(one_hot)
        if o.augment:
            done = jnp.zeros((1, o.augment)) if augment is None else augment  # no bias: zeros change nothing
            y = y + Dense(embedded, self.dtype, bias=False, name="augment")(done)
        y = nn.silu(Dense(width, self.dtype, name="time_in")(y))
        return nn.silu(Dense(width, self.dtype, name="time_out")(y))


def fourier(time: Array, features: int) -> Array:
    """Sines, then cosines, of 2 pi z time at `features` / 2 frequencies z ~ N(0, 16^2) (Tancik et al. 2020).

    [n] -> [n, features]. The frequencies are drawn once for all networks, by a generator that NumPy promises never to
    change, and are no parameters: nobody trains them.
    """
    frequencies = 2.0 * np.pi * 16.0 * np.random.RandomState(0).normal(size=features // 2)
    angles = time.astype(jnp.float32)[:, None] * np.float32(frequencies)[None]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


EMBEDDINGS = {"positional": unet.sinusoidal, "fourier": fourier}
"""name -> (time [n], features) -> [n, features]."""


class ResidualBlock(nn.Module):
    """(x + conv(dropout(silu(norm(conv(resize(silu(norm(x)))) + condition))))) / sqrt(2).

    x is resized, too, and passes a 1x1 convolution where it is or where its width changes.
    """

    features: int
    dropout: float
    layer: int
    dtype: jnp.dtype
    resize: Callable[[Array], Array] | None

    @nn.compact
    def __call__(self, x: Array, condition: Array, keys: Array | None) -> Array:
        """[B,H,W,C], [B or 1,D] -> [B,H,W,features], with H and W as `resize` leaves them."""
        resize = self.resize or (lambda x: x)
        y = resize(nn.silu(GroupNorm(name="norm_0")(x)))
        y = Conv(self.features, dtype=self.dtype, name="conv_0")(y)
        y = unet.add(y, Dense(self.features, self.dtype, name="condition")(condition))
        y = layers.dropout(nn.silu(GroupNorm(name="norm_1")(y)), self.dropout, keys, self.layer)
        y = Conv(self.features, dtype=self.dtype, kernel_init=TINY, name="conv_1")(y)
        if self.resize or x.shape[-1] != self.features:
            x = Conv(self.features, size=1, dtype=self.dtype, name="skip")(resize(x))
        return SQRT_HALF * (x + y)


class Attention(nn.Module):
    """(x + out(attention(norm(x)))) / sqrt(2), one head over all pixels."""

    implementation: str
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B,H,W,C] -> the same."""
        B, H, W, C = x.shape
        y = GroupNorm(name="norm")(x).reshape(B, H * W, C)
        qkv = Dense(3 * C, self.dtype, SMALLER, name="qkv")(y).reshape(B, H * W, 3, 1, C)
        y = attention.attention(*jnp.moveaxis(qkv, 2, 0), self.implementation).reshape(B, H, W, C)
        return SQRT_HALF * (x + Dense(C, self.dtype, TINY, name="out")(y))


class HalvingConv(nn.Module):
    """A convolution, then the filter that halves; the former is evaluated as far outside as the latter looks."""

    features: int
    taps: tuple
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B,H,W,C] -> [B,H/2,W/2,features]."""
        edge = len(self.taps) // 2 - 1
        x = jnp.pad(x, ((0, 0), (edge, edge), (edge, edge), (0, 0)))
        x = Conv(self.features, dtype=self.dtype, name="conv")(x)
        return filtered(x, self.taps, down=2, padding=0)


def halved(x: Array, taps: tuple) -> Array:
    """Every second pixel of x, filtered: [B,H,W,C] -> [B,H/2,W/2,C]. Outside are zeros."""
    return filtered(x, taps, down=2, padding=len(taps) // 2 - 1)


def doubled(x: Array, taps: tuple) -> Array:
    """X with zeros between its pixels, filtered: [B,H,W,C] -> [B,2H,2W,C]. Outside are zeros."""
    return filtered(x, taps, up=2, padding=len(taps) // 2)


def filtered(x: Array, taps: tuple, *, up: int = 1, down: int = 1, padding: int) -> Array:
    """Along height and width: up - 1 zeros between pixels, `padding` zeros around, filter, keep every down-th.

    The taps are scaled so that a constant image stays what it is, away from its border.
    """
    gain = up / sum(taps)
    for axis in (1, 2):
        edges = [(padding, padding, up - 1) if a == axis else (0, 0, 0) for a in range(4)]
        y = jax.lax.pad(x, jnp.zeros((), x.dtype), edges)
        last = (y.shape[axis] - len(taps)) // down * down
        shifted = [jax.lax.slice_in_dim(y, k, k + last + 1, down, axis) for k in range(len(taps))]
        x = sum(gain * tap * part for tap, part in zip(taps, shifted, strict=True))
    return x
