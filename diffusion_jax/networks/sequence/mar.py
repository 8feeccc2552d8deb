"""MAR: masked autoregression over continuous latents (Li et al. 2024).

    classes, latents that are known  ->  encoder  ->  with [MASK] in the other places  ->  decoder  ->  z of each place
    (x_t, t, z)  ->  MLP  ->  noise and variance of a place's latent alone

A masked autoencoder (He et al. 2022) gives each place a vector z; a small MLP with adaptive norms, told of z, learns to
undo noise in that place (section 3.3). The encoder sees known latents only: here by a mask, which is the same function
as leaving the others out, at shapes that do not depend on their number.
"""

from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp

from diffusion_jax.networks import layers, remat, transformer
from diffusion_jax.networks.dit import TimeEmbedding
from diffusion_jax.networks.layers import Dense
from diffusion_jax.networks.transformer import NORMAL, BlockOptions, Norm, gated
from diffusion_jax.types import Array, TokenSpec


@dataclass(frozen=True, kw_only=True)
class MAROptions:
    """Sizes of a MAR. The defaults are MAR-B's.

    Attributes:
      width: of the residual streams; divisible by 4 and by `heads`.
      depth: number of blocks of the encoder, and of the decoder.
      heads: of each attention.
      mlp_ratio: width of a block's hidden layer over `width`.
      buffer: number of tokens that stand for the class.
      mlp_width: of the MLP that undoes noise.
      mlp_depth: number of its residual blocks.
      dropout: probability in the outputs of attention and MLP.
      attention: a row of `attention.IMPLEMENTATIONS`, or "auto".
      remat: from `remat.POLICIES`, what the backward pass keeps of each block.
    """

    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    buffer: int = 64
    mlp_width: int = 1024
    mlp_depth: int = 6
    dropout: float = 0.0
    attention: str = "auto"
    remat: str = "none"

    def __post_init__(self) -> None:
        if min(self.depth, self.buffer, self.mlp_width, self.mlp_depth) < 1:
            raise ValueError("depth, buffer, mlp_width and mlp_depth must be at least 1")
        remat.check(self.remat)
        self.block()

    def block(self) -> BlockOptions:
        """A plain block, as in the published code."""
        return BlockOptions(
            width=self.width,
            heads=self.heads,
            mlp_ratio=self.mlp_ratio,
            mlp="gelu_erf",
            dropout=self.dropout,
            attention=self.attention,
        )


class MAR(nn.Module):
    """A vector for each place, and the MLP that turns it into a denoiser of that place's latent."""

    options: MAROptions
    tokens: TokenSpec
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        """The two parts."""
        self.places = Places(self.options, self.tokens, self.dtype)
        self.denoiser = Denoiser(self.options, self.tokens.channels, self.dtype)

    def __call__(self, latents: Array, masked: Array, label: Array | None, x: Array, time: Array) -> Array:
        """Both, one after the other: the denoiser's output f32[B,T,2 channels] for x f32[B,T,channels] at f32[B,T]."""
        return self.denoise(x, time, self.encode(latents, masked, label))

    def encode(self, latents: Array, masked: Array, label: Array | None, keys: Array | None = None) -> Array:
        """See `sequence.Places.encode`."""
        return self.places(latents, masked, label, keys)

    def denoise(self, x: Array, time: Array, z: Array) -> Array:
        """See `sequence.Places.denoise`."""
        return self.denoiser(x, time, z)


class Places(nn.Module):
    """The masked autoencoder."""

    options: MAROptions
    tokens: TokenSpec
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, latents: Array, masked: Array, label: Array | None, keys: Array | None) -> Array:
        """(latents f32[B,T,channels], masked bool[B,T], label i32[B] or None, keys key[B] or None) -> [B,T,width]."""
        o, T = self.options, self.tokens.length
        norm = lambda name: Norm("layer", o.block().epsilon, name=name)
        position = lambda name, n: self.param(name, NORMAL, (n, o.width))[None].astype(self.dtype)
        begin = jnp.zeros((len(latents), o.buffer), bool)
        hidden = jnp.concatenate([begin, masked], axis=1)

        x = Dense(o.width, self.dtype, name="in")(latents)
        label = self.labelled(label, len(latents))[:, None].astype(self.dtype)
        x = jnp.concatenate([jnp.broadcast_to(label, (len(x), o.buffer, o.width)), x], axis=1)
        x = norm("in_norm")(x + position("encoder_position", o.buffer + T))
        x = self.through("encoder", x, 0, keys, ~hidden[:, None] & jnp.ones((1, o.buffer + T, 1), bool))
        x = Dense(o.width, self.dtype, name="between")(norm("encoder_norm")(x))

        mask = self.param("mask", NORMAL, (o.width,)).astype(self.dtype)[None, None]
        x = jnp.where(hidden[..., None], mask, x) + position("decoder_position", o.buffer + T)
        x = norm("decoder_norm")(self.through("decoder", x, o.depth, keys, None))
        return x[:, o.buffer :] + position("out_position", T)

    def labelled(self, label: Array | None, count: int) -> Array:
        """[B,width]: the label's vector; `num_classes`, the last row, stands for none."""
        table = self.param("label", NORMAL, (self.tokens.num_classes + 1, self.options.width))
        return table[jnp.full(count, self.tokens.num_classes) if label is None else label]

    def through(self, name: str, x: Array, first: int, keys: Array | None, mask: Array | None) -> Array:
        """X after the encoder's or the decoder's blocks, whose numbers begin at `first`."""
        kind = remat.block(transformer.Block, self.options.remat)
        for i in range(self.options.depth):
            block = kind(self.options.block(), self.dtype, name=f"{name}_{i}")
            x = block(x, first + i, keys, None, None, None, mask)
        return x


class Denoiser(nn.Module):
    """An MLP whose norms are modulated by time and z (Li et al. 2024, section 4.1)."""

    options: MAROptions
    channels: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, time: Array, z: Array) -> Array:
        """(x f32[...,channels], time f32[...] in [0, 1], z [...,width]) -> f32[...,2 channels]: noise and variance."""
        width, shape = self.options.mlp_width, x.shape
        x, z = x.reshape(-1, shape[-1]), z.reshape(-1, z.shape[-1])
        y = TimeEmbedding(width, self.dtype, name="time")(time.reshape(-1)) + Dense(width, self.dtype, name="z")(z)
        y = nn.silu(y)
        x = Dense(width, self.dtype, name="in")(x)
        for i in range(self.options.mlp_depth):
            x = Residual(width, self.dtype, name=f"block_{i}")(x, y)
        shift, scale = jnp.split(Dense(2 * width, self.dtype, layers.ZEROS, name="out_modulation")(y), 2, axis=-1)
        x = Norm("layer", 1e-6, name="out_norm")(x[:, None], shift[:, None], scale[:, None])[:, 0]
        x = Dense(2 * self.channels, jnp.float32, layers.ZEROS, name="out")(x)
        return x.reshape(*shape[:-1], 2 * self.channels)


class Residual(nn.Module):
    """X + gate * MLP(norm(x) (1 + scale) + shift), the norm with an affine of its own."""

    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, y: Array) -> Array:
        """[n,width], and the condition [n,width] -> [n,width]."""
        vectors = Dense(3 * self.width, self.dtype, layers.ZEROS, name="modulation")(y)
        shift, scale, gate = jnp.split(vectors, 3, axis=-1)
        h = Norm("layer", 1e-6, name="norm")(x) * (1.0 + scale).astype(self.dtype) + shift
        h = nn.silu(Dense(self.width, self.dtype, name="mlp_in")(h))
        return gated(x, gate[:, None], Dense(self.width, self.dtype, name="mlp_out")(h))
