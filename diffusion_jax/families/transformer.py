"""The transformer family: an image is a sequence of tokens, and a network says how likely each of them is.

Read top to bottom: what a user sets; how it becomes a tokenizer, a network and a way of decoding; the loss; sampling;
editing; bits per dimension.

    image <-> tokens                                        the tokenizer; `pixels` has one for each grey value
    loss = -log p(token | what the network sees)            which is said by the way of decoding:
      autoregressive     the tokens before it                 and tokens are drawn one after the other
      maskgit            those that are not masked            and many are drawn at once, the surest first
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax import grey, plugs, rng, tokenizers
from diffusion_jax.errors import require
from diffusion_jax.families.transformer_autoregressive import Autoregressive
from diffusion_jax.families.transformer_draws import Options, Shown
from diffusion_jax.families.transformer_maskgit import MaskGIT
from diffusion_jax.networks import sequence
from diffusion_jax.settings import from_section
from diffusion_jax.tokenizers import Tokenizer
from diffusion_jax.types import (
    Array,
    Aux,
    Batch,
    Condition,
    Context,
    Family,
    ImageSpec,
    Player,
    TokenSpec,
    Tree,
    Weights,
)

DECODINGS = {"autoregressive": Autoregressive, "maskgit": MaskGIT}
"""How tokens are learned and drawn: name -> builder (network, tokens); each refuses a network of another kind."""

# ---------------------------------------------------------------------------------------------- what a user sets


@dataclass(frozen=True, kw_only=True)
class FamilySettings:
    """The config's `family` section. Each string names a row of a table, with options: `"gpt(width=128)"`.

    Attributes:
      network: from `networks.sequence.NETWORKS`.
      tokenizer: from `tokenizers.TOKENIZERS`.
      decoding: from `DECODINGS`.
      label_dropout: share of training examples whose label is hidden, in [0, 1); guidance needs some.
      label_smoothing: share of a token's target that is spread over all tokens, in [0, 1).
    """

    network: str = "gpt"
    tokenizer: str = "pixels"
    decoding: str = "autoregressive"
    label_dropout: float = 0.1
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        for name in ("label_dropout", "label_smoothing"):
            value = getattr(self, name)
            require(0.0 <= value < 1.0, f"family.{name}", value, "must lie in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """The family's part of the config's `sample` section.

    Attributes:
      guidance: weight of the conditional logits against those without a label; 1 is the conditional model alone.
      temperature: by which logits are divided; 0 draws the likeliest token.
      top_k: only so many of the likeliest tokens are drawn from; 0 for all.
      top_p: only the fewest tokens that hold so much of the probability are drawn from; 1 for all.
      steps: of maskgit, at most the number of tokens; 0 for its own.
      choice_temperature: of maskgit, how much chance there is in which tokens are kept first; -1 for its own.
    """

    guidance: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    steps: int = 0
    choice_temperature: float = -1.0

    def __post_init__(self) -> None:
        for name in ("guidance", "temperature", "top_k", "steps"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"sample.{name}", value, "must be a number from 0 on")
        require(0.0 < self.top_p <= 1.0, "sample.top_p", self.top_p, "must lie in (0, 1]")
        for name in ("top_k", "steps"):
            require(getattr(self, name) < 2**31, f"sample.{name}", getattr(self, name), "must be below 2^31")
        fine = self.choice_temperature == -1.0 or 0.0 <= self.choice_temperature < math.inf
        require(fine, "sample.choice_temperature", self.choice_temperature, "must be a number from 0 on, or -1")


# ---------------------------------------------------------------------------------------------- how it is built


def build(settings: FamilySettings, spec: ImageSpec, precision: str) -> Family:
    """The family for images of `spec`, computing in `precision`.

    Raises:
      UserError: for an unknown row or option, or rows that do not fit together.
    """
    tokenizer = tokenizers.build("family.tokenizer", settings.tokenizer, spec)
    tokens = TokenSpec(
        grid=tokenizer.grid,
        vocabulary=tokenizer.vocabulary,
        channels=tokenizer.channels,
        num_classes=spec.num_classes,
    )
    network = sequence.build("family.network", settings.network, tokens, precision)
    return Model(
        spec=spec,
        tokenizer=tokenizer,
        decoding=plugs.build("family.decoding", settings.decoding, DECODINGS, network=network, tokens=tokens),
        init_network=network.init,
        label_dropout=settings.label_dropout,
        label_smoothing=settings.label_smoothing,
    ).family()


@dataclass(frozen=True, kw_only=True)
class Model:
    """The parts, put together. `spec.num_classes` is the label that stands for no label."""

    spec: ImageSpec
    tokenizer: Tokenizer
    decoding: Autoregressive | MaskGIT
    init_network: Callable[[Array], Tree]
    label_dropout: float
    label_smoothing: float

    def family(self) -> Family:
        """What everyone else sees of the model."""
        exact = isinstance(self.decoding, Autoregressive) and not self.tokenizer.channels
        return Family(
            name="transformer",
            players=(Player(name="transformer", loss=self.loss),),
            init=self.init,
            generate=self.generate,
            sampling=self.sampling,
            nll=self.nll if exact else None,
            edits={"inpaint": self.inpaint} if isinstance(self.decoding, MaskGIT) else {},
            counted=self.counted,
            run=lambda weights, condition: self.decoding.run(weights["transformer"], condition.get("label")),
        )

    def init(self, key: Array) -> tuple[Weights, Tree]:
        """The network is the one player; there is no extra state."""
        return {"transformer": self.init_network(key)}, {}

    def encode(self, images: Array, keys: Array) -> Array:
        """Images f32[B,H,W,C] as tokens i32[B,T], place after place. The tokenizers of the table have no parameters."""
        return self.tokenizer.encode({}, images, keys).reshape(len(images), -1)

    def decode(self, tokens: Array) -> Array:
        """Tokens i32[n,T] as images f32[n,H,W,C] in [-1, 1]."""
        return self.tokenizer.decode({}, tokens.reshape(len(tokens), *self.tokenizer.grid))

    # ------------------------------------------------------------------------------------------ training

    def loss(self, params: Weights, ctx: Context) -> tuple[Array, Aux]:
        """Nats a token, in the mean over the batch; some labels are hidden, so that guidance can be learned."""
        keys = rng.example_keys(ctx.key, ctx.batch["index"])
        label = self.hide_labels(ctx.batch, rng.fold(keys, 0))
        tokens = self.encode(ctx.batch["image"], rng.fold(keys, 1))
        losses, metrics = self.decoding.losses(
            params["transformer"], tokens, label, rng.fold(keys, 2), rng.fold(keys, 3), self.label_smoothing
        )
        return jnp.mean(losses), Aux(metrics=metrics, extra=ctx.extra)

    def hide_labels(self, batch: Batch, keys: Array) -> Array | None:
        """Labels i32[B], each replaced by "none" with probability `label_dropout`."""
        if not self.spec.num_classes:
            return None
        return jnp.where(rng.uniform(keys) < self.label_dropout, self.spec.num_classes, batch["label"])

    # ------------------------------------------------------------------------------------------ sampling

    def generate(self, weights: Weights, keys: Array, condition: Condition, options: Options) -> Array:
        """Images f32[n,H,W,C] in [-1,1], one for each of keys key[n]."""
        draw = lambda shown: self.decoding.generate(weights["transformer"], keys, shown, options)
        return self.decode(self.guided(draw, condition, options))

    def guided(self, draw: Callable[[Shown], Array], condition: Condition, options: Options) -> Array:
        """`draw` of the labels alone where guidance is 1, and else of a doubled batch."""
        label = condition.get("label")
        if label is None:
            return draw(Shown(label=None))
        both = Shown.both(label, self.spec.num_classes, options.guidance)
        return jax.lax.cond(options.guidance == 1.0, lambda: draw(Shown(label=label)), lambda: draw(both))

    def counted(self, note: Callable[[int], None]) -> Family:
        """The same family, whose network says at each of its runs how many images it was given."""
        return replace(self, decoding=self.decoding.counted(note)).family()

    def sampling(self, section: Mapping[str, Any]) -> Options:
        """Check the config's `sample` section and make it options of `generate`."""
        settings = from_section(SampleSettings, section, "sample")
        labels = bool(self.spec.num_classes and self.label_dropout)
        rule = "must be 1 for a model without labels or label_dropout"
        require(settings.guidance == 1.0 or labels, "sample.guidance", settings.guidance, rule)
        return self.decoding.options(
            steps=settings.steps,
            choice_temperature=settings.choice_temperature,
            guidance=jnp.float32(settings.guidance),
            temperature=jnp.float32(settings.temperature),
            top_k=jnp.int32(settings.top_k),
            top_p=jnp.float32(settings.top_p),
        )

    def inpaint(self, weights: Weights, keys: Array, inputs: Mapping[str, Array], options: Options) -> Array:
        """Make the pixels of `image` that are not `known` bool[n,H,W,1], under `label`.

        A token is kept where all its pixels are known; in the result the known pixels are the image's own.
        """
        image, (h, w, d) = inputs["image"], self.tokenizer.grid
        tokens = self.encode(image, rng.fold(keys, 0))
        known = jnp.all(inputs["known"].reshape(len(image), h, image.shape[1] // h, w, -1), axis=(2, 4))
        known = jnp.repeat(known.reshape(len(image), h * w), d, axis=1)

        def draw(shown: Shown) -> Array:
            return self.decoding.inpaint(weights["transformer"], tokens, known, rng.fold(keys, 1), shown, options)

        return jnp.where(inputs["known"], image, self.decode(self.guided(draw, inputs, options)))

    # ------------------------------------------------------------------------------------------ likelihood

    def nll(self, weights: Weights, batch: Batch, key: Array) -> Array:
        """Bits per dimension f32[B] of the batch's images under their labels: exact, so that no key is needed."""
        label = batch["label"] if self.spec.num_classes else None
        tokens = self.encode(batch["image"], rng.example_keys(key, batch["index"]))
        nats = self.decoding.nats(weights["transformer"], tokens, label)
        return grey.bits_per_dimension(nats, math.prod(self.spec.shape))
