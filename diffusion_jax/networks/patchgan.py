"""The discriminator that judges patches (Isola et al. 2017, section 3.2.2 and appendix 6.1.2), VQGAN's.

    4x4 conv, stride 2 -> leaky -> [4x4 conv, stride 2 -> norm, leaky] ... -> 4x4 conv -> norm, leaky -> 4x4 conv

Each logit sees a square of the image alone, 70 pixels wide for 3 halvings, 34 for 2, 16 for 1, but for the norms' means
and variances. Batch norm is group norm here: an image's logits must not depend on the images beside it.
"""

from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp

from diffusion_jax.networks.layers import Conv, GroupNorm
from diffusion_jax.types import Array

NORMAL = nn.initializers.normal(0.02)


@dataclass(frozen=True, kw_only=True)
class PatchGANOptions:
    """Sizes of the discriminator.

    Attributes:
      channels: behind the first convolution, a power of two. Twice as many behind each further one, up to 8 times.
      halvings: convolutions with stride 2.
    """

    channels: int = 64
    halvings: int = 3

    def __post_init__(self) -> None:
        if self.channels < 4 or self.channels & (self.channels - 1):
            raise ValueError(f"channels must be a power of two from 4 on, not {self.channels}")
        if self.halvings < 1:
            raise ValueError(f"halvings must be at least 1, not {self.halvings}")


def size_error(options: PatchGANOptions, size: int) -> str:
    """Why images of `size` pixels have no patch to judge, or ""."""
    least = 3 * 2**options.halvings
    if size >= least:
        return ""
    return f"with halvings = {options.halvings} images must be at least {least} pixels wide, and {size} is less"


class PatchGAN(nn.Module):
    """An image to the logits of its patches."""

    options: PatchGANOptions
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[n,H,W,C] -> f32[n,H',W'], with H' = H / 2^halvings - 2."""
        o = self.options
        x = nn.leaky_relu(Conv(o.channels, 4, 2, 1, self.dtype, NORMAL, name="in")(x), 0.2)
        for i in range(1, o.halvings + 1):
            stride = 2 if i < o.halvings else 1
            features = o.channels * min(2**i, 8)
            x = Conv(features, 4, stride, 1, self.dtype, NORMAL, bias=False, name=f"conv_{i}")(x)
            x = nn.leaky_relu(GroupNorm(epsilon=1e-5, name=f"norm_{i}")(x), 0.2)
        return Conv(1, 4, 1, 1, jnp.float32, NORMAL, name="out")(x)[..., 0]
