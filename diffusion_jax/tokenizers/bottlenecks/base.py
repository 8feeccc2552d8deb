"""What stands between an encoder and a decoder: the same five functions whatever it is."""

from typing import NamedTuple, Protocol

from diffusion_jax.types import Array, Metrics, Tree


class Passed(NamedTuple):
    """What a bottleneck makes of a batch in training.

    Attributes:
      z: f32[B,h,w,latents], for the decoder; gradients reach the encoder through it.
      loss: f32[B], what the bottleneck itself asks for, beside an error that is a mean over the image's numbers.
      metrics: for the log.
      extra: what changes without gradient, with this batch in it.
    """

    z: Array
    loss: Array
    metrics: Metrics
    extra: Tree


class Bottleneck(Protocol):
    """A row of `BOTTLENECKS`. `params` may hold more than what is its own."""

    @property
    def outputs(self) -> int:
        """Numbers a place that it asks of the encoder."""
        ...

    @property
    def latents(self) -> int:
        """Numbers a place that it hands to the decoder."""
        ...

    @property
    def digits(self) -> tuple[int, ...]:
        """How many values each digit of a code takes, see `codes.token`; none where latents are continuous."""
        ...

    def init(self, key: Array) -> tuple[Tree, Tree]:
        """(Parameters, what changes without gradient), both dictionaries."""
        ...

    def train(self, params: Tree, extra: Tree, y: Array, keys: Array, step: Array) -> Passed:
        """What becomes of the encoder's y f32[B,h,w,outputs] in `step` i32[], drawn by keys key[B].

        All microbatches of a step are treated alike: what `extra` says of the step itself is read by the next one only.
        """
        ...

    def encode(self, params: Tree, y: Array, keys: Array | None) -> Array:
        """Codes i32[B,h,w] of y f32[B,h,w,outputs], or latents f32[B,h,w,latents], drawn by keys where these are."""
        ...

    def decode(self, params: Tree, given: Array) -> Array:
        """z f32[B,h,w,latents] of what `encode` returns."""
        ...

    def nearest(self, params: Tree, z: Array) -> Array:
        """The nearest to z f32[B,h,w,latents] of what the decoder was trained on: of codes, where there are codes."""
        ...

    def settle(self, params: Tree, extra: Tree) -> Tree:
        """The parameters after an update, as `extra` wants them: see `Player.settle`."""
        ...
