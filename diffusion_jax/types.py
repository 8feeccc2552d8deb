"""The vocabulary. Everything that two rooms of the package say to each other is said in these types."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import jax

Array = jax.Array
Tree = Any  # a pytree of arrays

Batch = Mapping[str, Array]
"""`image` f32[B,H,W,C] in [-1,1]; `label` i32[B] where the data has classes; `index` i32[B], the place in the batch.

In training also `augment` f32[B,width], what augmentation has done to the image, where the network is told of it; and
`encoded` [B,...] in the place of `image`, where a frozen tokenizer has read the images beforehand: see `FirstStage`.
"""

Condition = Mapping[str, Array]
"""What an image is to show: `label` i32[n], or nothing."""

Weights = Mapping[str, Tree]
"""One tree of parameters a player."""

Metrics = Mapping[str, Array]
"""Named f32[] values, averaged over the steps between two log lines."""


class Denoised(NamedTuple):
    """What a model makes of x_t = alpha x0 + sigma eps: both parts, so that nobody divides by an alpha or sigma of 0.

    Attributes:
      x0: f32[n,H,W,C].
      eps: f32[n,H,W,C].
      spread: f32[n,H,W,C] in [0, 1] where the model has learned its variance, else None: log variance of the ancestral
        step between its least (0) and its largest (1) value (Nichol & Dhariwal 2021, eq. 15).
    """

    x0: Array
    eps: Array
    spread: Array | None = None


Denoiser = Callable[[Array, Array], Denoised]
"""(x f32[n,H,W,C], t f32[] or f32[n]) -> `Denoised`."""

LabelDenoiser = Callable[[Array, Array, Array | None], Denoised]
"""(x, t, label i32[n], or None without classes) -> `Denoised`."""


@dataclass(frozen=True, kw_only=True)
class ImageSpec:
    """What the data looks like: all that a family has to know of it.

    Attributes:
      size: height and width in pixels.
      channels: 1 or 3.
      num_classes: number of labels, 0 for data without labels.
      levels: number of grey levels a channel that the data has (256 for 8-bit images, 17 for the digits).
    """

    size: int
    channels: int
    num_classes: int
    levels: int = 256

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return (self.size, self.size, self.channels)


@dataclass(frozen=True, kw_only=True)
class TokenSpec:
    """What a network has to know of the tokens that an image has become.

    Attributes:
      grid: (h, w, d), d tokens a place.
      vocabulary: number of different tokens; 0 where there is a vector of numbers in each place.
      channels: of such a vector, or of the one that a token stands for; 0 for pixels.
      num_classes: number of labels, 0 for data without labels.
      scales: side of each scale, where the tokens are of several, the last of which is the grid's; empty for one grid.
    """

    grid: tuple[int, int, int]
    vocabulary: int
    channels: int
    num_classes: int
    scales: tuple[int, ...] = ()

    @property
    def length(self) -> int:
        """T, the number of tokens of an image, in raster order, one scale after the other."""
        return sum(side**2 for side in self.scales) or math.prod(self.grid)


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a loss may look at besides the parameters.

    Attributes:
      batch: the examples.
      key: a key that belongs to this player and this step; `rng.example_keys` makes one an example out of it.
      common: a key of this step that all players share: what is drawn by it is the same for each of them.
      step: i32[].
      extra: state that changes without gradient.
      ema: the averaged weights, by profile.
      frozen: parameters of other models, never trained here.
    """

    batch: Batch
    key: Array
    common: Array
    step: Array
    extra: Tree
    ema: Mapping[str, Weights]
    frozen: Tree


class Aux(NamedTuple):
    """What a loss returns beside its value: metrics for the log, and the new `extra`."""

    metrics: Metrics
    extra: Tree


LossFn = Callable[[Weights, Context], tuple[Array, Aux]]
"""Differentiated with respect to `params[player.name]` alone."""


@dataclass(frozen=True, kw_only=True)
class Player:
    """One group of parameters and the loss that it alone minimises, every `every`-th step.

    It rests before step `start`. Its learning rate is `rate` times the config's. After each update `project`, where
    there is one, puts the parameters back where they have to stay; then `settle` (own parameters, the new `extra`) sets
    those that follow no gradient.
    """

    name: str
    loss: LossFn
    every: int = 1
    rate: float = 1.0
    start: int = 0
    project: Callable[[Tree], Tree] | None = None
    settle: Callable[[Tree, Tree], Tree] | None = None


class Generate(Protocol):
    """(weights, keys, condition, options) -> images."""

    def __call__(self, weights: Weights, keys: Array, condition: Condition, options: Tree) -> Array:
        """Make one image for each of `keys` key[n], as f32[n,H,W,C] in [-1,1].

        Image i depends on `keys[i]`, on row i of `condition`, and on nothing else of the batch.
        `options` is what the family's `sampling` built; its leaves may be traced.
        """
        ...


Edit = Callable[[Weights, Array, Mapping[str, Array], Tree], Array]
"""(weights, keys key[n], inputs by name, options of `generate`) -> images f32[n,H,W,C] in [-1,1]."""


@dataclass(frozen=True, kw_only=True)
class Latent:
    """What a family's images are made from: for whoever walks there, between two images or along one dimension.

    `generate(weights, keys, condition, options)` is `decode(weights, draw(keys, options), keys, condition, options)`.

    Attributes:
      shape: of one latent; about N(0, 1) in each number.
      draw: (keys key[n], options) -> z f32[n,*shape].
      decode: (weights, z, keys, condition, options) -> images f32[n,H,W,C] in [-1,1].
      encode: (weights, images, keys, condition, options) -> z f32[n,*shape], which `decode` leads back to the images as
        well as the family can; None where there is no way back.
    """

    shape: tuple[int, ...]
    draw: Callable[[Array, Tree], Array]
    decode: Callable[[Weights, Array, Array, Condition, Tree], Array]
    encode: Callable[[Weights, Array, Array, Condition, Tree], Array] | None = None


@dataclass(frozen=True, kw_only=True)
class FirstStage:
    """What a family models in the place of images, where a frozen tokenizer stands between the two.

    The tokenizer's parameters are `frozen["tokenizer"]` in training and `weights["tokenizer"]` afterwards: `params`,
    and with `measured` also `shift` and `scale`, f32[channels] each, of what `encode` makes of the training images.

    Attributes:
      shape: of what it makes of an image.
      dtype: of that: int32 for tokens, float32 for latents.
      measured: whether the family standardises it: (encoded - shift) * scale has mean 0 and deviation 1 by channel.
      encode: (frozen or weights, images f32[B,H,W,C]) -> [B,*shape].
      decode: (frozen or weights, what the family models) -> images f32[B,H,W,C] in [-1,1].
    """

    shape: tuple[int, ...]
    dtype: Any
    measured: bool
    encode: Callable[[Tree, Array], Array]
    decode: Callable[[Tree, Array], Array]


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model family: pure functions only. The trainer, the sampler and the evaluation see nothing else of a model.

    Attributes:
      name: as in the registry.
      players: in the order of their updates; a later one sees an earlier one's.
      init: key -> (params by player, extra).
      generate: see `Generate`.
      sampling: the config's `sample` section, less what all families share, -> options of `generate`.
      nll: (weights, batch, key) -> f32[B] in bits per dimension; None where the family has no likelihood.
      dequantised: whether `nll` adds uniform noise of one grey level's width to the images, for a model that is a
        density; where not, it is of the discrete images as they are.
      bound: whether `nll`, though nothing in it is drawn, is an upper bound of the bits.
      trajectory: as `generate`, with the number of steps as a last argument, a Python number -> all stops on the way,
        f32[n,steps + 1,H,W,C]; None where there is no way.
      latent: what images are made from; None where that is nothing one could walk in.
      edits: what else can be done with a trained model, by name.
      denoise: weights -> the plain model, prepared for a loop; None where the family has no noise.
      augment: width of the label of augmentation that the training batches must have; 0 for none.
      counted: (note) -> this family, whose network calls note(number of images) at each of its runs, for counting
        evaluations; it has `denoise` or `run` too. None where making an image takes one evaluation.
      run: (weights, condition of one image) -> what one evaluation of the network gives; None where `denoise` says it.
      warnings: (metrics, means since the last log line) -> what is wrong with the training, a sentence by name.
      tokenizer: the `tokenizers.Tokenizer` that this family trains; None where it trains none.
      first_stage: what stands between its model and images; None where it models the images themselves.
      frozen: (() -> weights of the classifier that evaluation fits) -> what the losses find in `Context.frozen` beside
        a tokenizer; only training asks for it. None where that is nothing.
      guided_by: another family's `denoise` -> this family, guided away from it; its weights then hold the other's as
        `weak`.
    """

    name: str
    players: tuple[Player, ...]
    init: Callable[[Array], tuple[Weights, Tree]]
    generate: Generate
    sampling: Callable[[Mapping[str, Any]], Tree]
    nll: Callable[[Weights, Batch, Array], Array] | None = None
    dequantised: bool = False
    bound: bool = False
    trajectory: Callable[[Weights, Array, Condition, Tree, int], Array] | None = None
    latent: Latent | None = None
    edits: Mapping[str, Edit] = field(default_factory=dict)
    denoise: Callable[[Weights], LabelDenoiser] | None = None
    augment: int = 0
    counted: Callable[[Callable[[int], None]], "Family"] | None = None
    run: Callable[[Weights, Condition], Tree] | None = None
    warnings: Callable[[Mapping[str, float]], Mapping[str, str]] = lambda metrics: {}
    tokenizer: Any = None
    first_stage: FirstStage | None = None
    frozen: Callable[[Callable[[], Tree]], Tree] | None = None
    guided_by: Callable[[Callable], "Family"] | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TrainState:
    """All that changes during a run; a checkpoint is this, the data position (`step`) and the config.

    Attributes:
      step: i32[], number of finished steps.
      params: trained by gradient, by player.
      opt_state: the optimizer's, by player.
      ema: averaged weights, by profile and player.
      extra: changes without gradient.
      skipped: i32[] each: `total` updates left out because something was not finite, `in_a_row` the present streak.
    """

    step: Array
    params: dict[str, Tree]
    opt_state: dict[str, Tree]
    ema: dict[str, dict[str, Tree]]
    extra: Tree
    skipped: dict[str, Array] = field(default_factory=dict)
