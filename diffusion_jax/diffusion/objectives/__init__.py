"""Objectives: what a diffusion model is trained to regress on, one loss an example."""

from collections.abc import Callable
from typing import Protocol

from diffusion_jax.diffusion.objectives.denoising import Denoising
from diffusion_jax.diffusion.objectives.learned_variance import LearnedVariance
from diffusion_jax.types import Array, Denoised


class Objective(Protocol):
    """A row of `OBJECTIVES`, built with a prediction, a time sampling and a weighting."""

    def channels(self, image: int) -> int:
        """Channels that the network puts out, for images of `image` channels."""
        ...

    def loss(self, predict: Callable[[Array, Array], Array], x0: Array, u: Array, keys: Array) -> tuple[Array, Array]:
        """Losses f32[B] and times f32[B].

        Args:
          predict: (x f32[B,H,W,C], t f32[B]) -> the network's output f32[B,H,W,channels].
          x0: f32[B,H,W,C] in [-1,1].
          u: f32[B] in [0, 1), quantiles of the times.
          keys: key[B], for the noise, one an example.
        """
        ...

    def denoised(self, x: Array, y: Array, t: Array) -> Denoised:
        """What the network's output y f32[n,H,W,channels] at x f32[n,H,W,C] and t f32[] or f32[n] says."""
        ...


OBJECTIVES = {"denoising": Denoising, "learned_variance": LearnedVariance}
