"""U-ViT (Bao et al. 2023, "All are worth words"): time, label and patches are all tokens; long skips join the halves.

    tokens -> in-blocks -> middle block -> out-blocks -> norm -> patches -> convolution

Each out-block sees x <- W [x, skip], the skip being what its mirror image among the in-blocks returned.
"""

from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp

from diffusion_jax.networks import layers, remat, transformer
from diffusion_jax.networks.layers import Conv, Dense
from diffusion_jax.networks.transformer import NORMAL, Block, BlockOptions, Norm
from diffusion_jax.types import Array


@dataclass(frozen=True, kw_only=True)
class UViTOptions:
    """Sizes of a U-ViT. The defaults are those of U-ViT-S for CIFAR-10.

    Attributes:
      patch: side of a patch in pixels; divides the image size.
      width: of the residual stream; divisible by 4 and by `heads`.
      depth: number of blocks beside the middle one; even.
      heads: of each attention.
      mlp_ratio: width of the MLP's hidden layer over `width`.
      convolution: whether a 3x3 convolution smooths the seams between patches at the end.
      null_label: whether "no label" is learned as one more label; it is a token of zeros otherwise.
      dropout: probability in the outputs of attention and MLP.
      attention: a row of `attention.IMPLEMENTATIONS`, or "auto".
      remat: from `remat.POLICIES`, what the backward pass keeps of each block.
    """

    patch: int = 2
    width: int = 512
    depth: int = 12
    heads: int = 8
    mlp_ratio: float = 4.0
    convolution: bool = True
    null_label: bool = True
    dropout: float = 0.0
    attention: str = "auto"
    remat: str = "none"

    def __post_init__(self) -> None:
        if self.patch < 1:
            raise ValueError(f"patch must be at least 1, not {self.patch}")
        if self.depth < 2 or self.depth % 2:
            raise ValueError(f"depth must be even and at least 2, not {self.depth}")
        remat.check(self.remat)
        self.block()

    def block(self) -> BlockOptions:
        """A plain block, as in the published code."""
        return BlockOptions(
            width=self.width,
            heads=self.heads,
            mlp_ratio=self.mlp_ratio,
            mlp="gelu_erf",
            epsilon=1e-5,
            qkv_bias=False,
            dropout=self.dropout,
            attention=self.attention,
        )


class UViT(nn.Module):
    """Tokens -> blocks with long skips -> patches."""

    options: UViTOptions
    channels_out: int
    num_classes: int  # 0: no label; the label `num_classes` itself stands for "none"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, time: Array, label: Array | None, keys: Array | None) -> Array:
        """See `networks.Network.apply`."""
        o = self.options
        H, W = x.shape[1:3]

        tokens = Dense(o.width, self.dtype, layers.UNIFORM, name="patch_in")(transformer.cut(x, o.patch))
        patches = tokens.shape[1]
        tokens = transformer.prepend(layers.sinusoidal(1000.0 * time, o.width)[:, None], tokens)
        if self.num_classes:
            tokens = transformer.prepend(self.embedded(label)[:, None], tokens)
        tokens = tokens + self.param("positions", NORMAL, tokens.shape[1:])[None].astype(self.dtype)

        block = lambda name: remat.block(Block, o.remat)(o.block(), self.dtype, name=name)
        skips = []
        for i in range(o.depth // 2):
            tokens = block(f"in_{i}")(tokens, i, keys)
            skips.append(tokens)
        tokens = block("middle")(tokens, o.depth // 2, keys)
        for i in range(o.depth // 2):
            both = jnp.concatenate([tokens, skips.pop()], axis=-1)
            tokens = Dense(o.width, self.dtype, NORMAL, name=f"skip_{i}")(both)
            tokens = block(f"out_{i}")(tokens, o.depth // 2 + 1 + i, keys)

        tokens = Norm("layer", o.block().epsilon, name="out_norm")(tokens[:, -patches:])
        tokens = Dense(o.patch**2 * self.channels_out, jnp.float32, NORMAL, name="patch_out")(tokens)
        y = transformer.join(tokens, o.patch, H, W)
        return Conv(self.channels_out, kernel_init=layers.UNIFORM, name="out")(y) if o.convolution else y

    def embedded(self, label: Array) -> Array:
        """i32[B] -> [B, width]."""
        rows = self.num_classes + self.options.null_label
        table = self.param("label", nn.initializers.normal(1.0), (rows, self.options.width))
        return jnp.take(table, label, axis=0, mode="fill", fill_value=0.0)


def size_error(options: UViTOptions, size: int) -> str:
    """Why images of `size` pixels cannot be cut into patches, or ""."""
    return transformer.patch_error(options.patch, size)
