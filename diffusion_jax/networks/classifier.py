"""A small convolutional classifier, whose last hidden layer is the space in which evaluation compares images."""

import flax.linen as nn

from diffusion_jax.networks.layers import Conv, Dense
from diffusion_jax.types import Array

HE = nn.initializers.he_normal()


def first_stride(size: int) -> int:
    """2 for images of more than 16 pixels, for which a stage at full size would cost more than all others."""
    return 2 if size > 16 else 1


def stage_widths(size: int) -> tuple[int, ...]:
    """Channels of the stages for images of `size` pixels: the grid is halved between stages until it is at most 4x4.

    8 pixels: (16, 32); 32 pixels: (16, 32, 64); 64 pixels: (16, 32, 64, 128); 128 channels at most.
    """
    size = -(-size // first_stride(size))
    widths = [16]
    while size > 4:
        size = -(-size // 2)
        widths.append(min(2 * widths[-1], 128))
    return tuple(widths)


class Classifier(nn.Module):
    """One convolution a stage, each but the first with stride 2, then two dense layers."""

    num_classes: int
    widths: tuple[int, ...]
    features: int

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        """f32[B,H,W,C] in [-1,1] -> logits f32[B,num_classes], features f32[B,features], which are not negative."""
        x = nn.relu(Conv(self.widths[0], stride=first_stride(x.shape[1]), kernel_init=HE)(x))
        for width in self.widths[1:]:
            x = nn.relu(Conv(width, stride=2, kernel_init=HE)(x))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(Dense(self.features, kernel_init=HE)(x))
        return Dense(self.num_classes)(x), x
