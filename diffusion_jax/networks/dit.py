"""DiT: a transformer over patches (Peebles & Xie 2022), with the ways of conditioning of its section 3.2.

    patches -> tokens + fixed positions -> blocks -> norm -> patches

Time and label reach the blocks in one of four ways (figure 3):

    adaln_zero        their sum shifts, scales and gates every branch; all begin at zero
    adaln             their sum shifts and scales every branch
    in_context        two more tokens, dropped at the end
    cross_attention   two tokens that every block looks at

Beside the paper's forms there are later ones, each off by default: rotary positions, normalised queries and keys,
SwiGLU, RMS norms, register tokens, and one modulation for all blocks.
"""

from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from diffusion_jax.networks import layers, remat, transformer
from diffusion_jax.networks.layers import Dense
from diffusion_jax.networks.transformer import NORMAL, BlockOptions, Norm
from diffusion_jax.types import Array, ImageSpec

CONDITIONING = {"adaln_zero": 3, "adaln": 2, "in_context": 0, "cross_attention": 0}
"""name -> how many vectors a branch of a block takes from the condition."""


@dataclass(frozen=True, kw_only=True)
class DiTOptions(BlockOptions):
    """Sizes and parts of a DiT. The defaults are DiT-S/2's.

    Attributes:
      patch: side of a patch in pixels; divides the image size.
      depth: number of blocks.
      conditioning: a row of CONDITIONING.
      shared_modulation: one layer gives the modulation of all blocks, each of which adds a table of its own (Chen et
        al. 2023, PixArt-alpha, section 2.3); with "adaln" and "adaln_zero".
      rope: rotary positions in 2-D in place of fixed ones that are added; `width` / `heads` is divisible by 4 then.
      registers: learned tokens beside the patches, dropped at the end (Darcet et al. 2024).
      scan: compile one block for all; its parameters are stacked.
      remat: from `remat.POLICIES`, what the backward pass keeps of each block.
    """

    patch: int = 2
    depth: int = 12
    conditioning: str = "adaln_zero"
    shared_modulation: bool = False
    rope: bool = False
    registers: int = 0
    scan: bool = False
    remat: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.patch, self.depth) < 1:
            raise ValueError("patch and depth must be at least 1")
        if self.conditioning not in CONDITIONING:
            raise ValueError(f"conditioning must be one of {', '.join(CONDITIONING)}, not {self.conditioning!r}")
        if self.shared_modulation and not CONDITIONING[self.conditioning]:
            raise ValueError(f"shared_modulation needs adaln or adaln_zero, not {self.conditioning!r}")
        if self.rope and (self.width // self.heads) % 4:
            raise ValueError(f"rope needs width / heads divisible by 4, not {self.width // self.heads}")
        if self.registers < 0:
            raise ValueError(f"registers must be at least 0, not {self.registers}")
        remat.check(self.remat)


class DiT(nn.Module):
    """Patches -> blocks -> patches."""

    options: DiTOptions
    channels_out: int
    num_classes: int  # 0: no label; the label `num_classes` itself stands for "none"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, time: Array, label: Array | None, keys: Array | None) -> Array:
        """See `networks.Network.apply`."""
        o = self.options
        H, W = x.shape[1:3]
        grid = H // o.patch, W // o.patch

        tokens = Dense(o.width, self.dtype, name="patch_in")(transformer.cut(x, o.patch))
        if not o.rope:
            tokens = tokens + jnp.asarray(positions_2d(*grid, o.width)[None], self.dtype)
        patches = tokens.shape[1]
        if o.registers:
            tokens = transformer.prepend(self.param("registers", NORMAL, (1, o.registers, o.width)), tokens)

        given = self.embedded(time, label)
        condition = shared = context = None
        if CONDITIONING[o.conditioning]:
            condition = shared = nn.silu(sum(given))
            if o.shared_modulation:
                count = 2 * CONDITIONING[o.conditioning]
                shared = Dense(count * o.width, self.dtype, layers.ZEROS, name="modulation")(condition)
        elif o.conditioning == "in_context":
            tokens = transformer.prepend(side_by_side(given), tokens)
        else:
            context = side_by_side(given)

        rotation = None
        if o.rope:
            angles = transformer.angles_2d(*grid, o.width // o.heads)
            rotation = transformer.turns(transformer.unmoved(angles, tokens.shape[1] - patches))
        tokens = transformer.stack(
            self.block, o.depth, tokens, keys, shared, context, rotation, policy=o.remat, scan=o.scan
        )

        shift = scale = None
        if condition is not None:
            vectors = Dense(2 * o.width, self.dtype, layers.ZEROS, name="out_modulation")(condition)
            shift, scale = jnp.split(vectors[:, None], 2, axis=-1)
        tokens = Norm(o.norm, o.epsilon, name="out_norm")(tokens[:, -patches:], shift, scale)
        tokens = Dense(o.patch**2 * self.channels_out, jnp.float32, layers.ZEROS, name="patch_out")(tokens)
        return transformer.join(tokens, o.patch, H, W)

    def embedded(self, time: Array, label: Array | None) -> list[Array]:
        """Vectors [B or 1, width] of the time and, where there are classes, of the label."""
        vectors = [TimeEmbedding(self.options.width, self.dtype, name="time")(time)]
        if self.num_classes:
            table = self.param("label", NORMAL, (self.num_classes + 1, self.options.width))
            vectors.append(table[label].astype(self.dtype))
        return vectors

    def block(self, kind: type[nn.Module], name: str) -> nn.Module:
        """One block of the class `kind`."""
        o = self.options
        return kind(o, self.dtype, CONDITIONING[o.conditioning], o.shared_modulation, name=name)

    @staticmethod
    def fixed(options: DiTOptions, image: ImageSpec) -> int:
        """The published table of positions is fixed, and counted."""
        return 0 if options.rope else (image.size // options.patch) ** 2 * options.width


class TimeEmbedding(nn.Module):
    """Sinusoids of 1000 t, then a two-layer MLP."""

    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, time: Array) -> Array:
        """[n] -> [n, width]."""
        y = layers.sinusoidal(1000.0 * time, 256).astype(self.dtype)
        y = nn.silu(Dense(self.width, self.dtype, NORMAL, name="in")(y))
        return Dense(self.width, self.dtype, NORMAL, name="out")(y)


def side_by_side(vectors: list[Array]) -> Array:
    """n vectors [B or 1, width] as tokens [B or 1, n, width]."""
    rows = max(len(vector) for vector in vectors)
    return jnp.stack([jnp.broadcast_to(vector, (rows, vector.shape[-1])) for vector in vectors], axis=1)


def positions_2d(height: int, width: int, features: int) -> np.ndarray:
    """Fixed sinusoidal positions f32[height * width, features]: first those of the column, then of the row."""
    frequencies = 10_000.0 ** (-np.arange(features // 4) / (features // 4))
    rows, columns = np.divmod(np.arange(height * width), width)
    angles = [place[:, None] * frequencies for place in (columns, rows)]
    halves = [f(angle) for angle in angles for f in (np.sin, np.cos)]  # in the order of the published weights
    return np.concatenate(halves, axis=-1).astype(np.float32)


def size_error(options: DiTOptions, size: int) -> str:
    """Why images of `size` pixels cannot be cut into patches, or ""."""
    return transformer.patch_error(options.patch, size)
