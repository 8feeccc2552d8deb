"""The transformer family: an image is a sequence of tokens, and a network says how likely each of them is.

Read top to bottom: what a user sets; how it becomes a tokenizer, a network and a way of decoding; the loss; sampling;
editing; bits per dimension.

    image <-> tokens                                        the tokenizer; `pixels` has one for each grey value
    loss = -log p(token | what the network sees)            which is said by the way of decoding:
      autoregressive     the tokens before it                 and tokens are drawn one after the other
      maskgit            those that are not masked            and many are drawn at once, the surest first
      var                those of coarser scales             and those of a scale are drawn at once
      mar                continuous latents that are not masked: no p, but a small diffusion model in each place
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax import grey, plugs, rng, tokenizers
from diffusion_jax.errors import require
from diffusion_jax.families.transformer_autoregressive import Autoregressive
from diffusion_jax.families.transformer_draws import Options, Shown
from diffusion_jax.families.transformer_mar import MAR
from diffusion_jax.families.transformer_maskgit import MaskGIT
from diffusion_jax.families.transformer_var import VAR
from diffusion_jax.networks import sequence
from diffusion_jax.settings import from_section
from diffusion_jax.tokenizers import Stage, Tokenizer
from diffusion_jax.tokenizers.stage import params_of
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

DECODINGS = {"autoregressive": Autoregressive, "mar": MAR, "maskgit": MaskGIT, "var": VAR}
"""How tokens are learned and drawn: name -> builder (network, tokens, scales); each refuses a network of another kind.

`reads` names the fields of the config's `sample` section that become its options.
"""

# ---------------------------------------------------------------------------------------------- what a user sets


@dataclass(frozen=True, kw_only=True)
class FamilySettings:
    """The config's `family` section. Each string names a row of a table, with options: `"gpt(width=128)"`.

    Attributes:
      network: from `networks.sequence.NETWORKS`.
      tokenizer: from `tokenizers.TOKENIZERS`, or "workdir:PATH" of a run that trained one.
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
      guidance_schedule: of var and mar, "linear" for a weight that grows from 1 with the scale or as places are filled,
        or "constant"; their own where empty.
      temperature: by which logits are divided; 0 draws the likeliest token. Of mar, by which noise is multiplied.
      top_k: only so many of the likeliest tokens are drawn from; 0 for all.
      top_p: only the fewest tokens that hold so much of the probability are drawn from; 1 for all.
      steps: of maskgit and mar, at most the number of tokens; 0 for its own.
      choice_temperature: of maskgit, how much chance there is in which tokens are kept first; -1 for its own.
      solver: of mar, from `diffusion.solvers.SOLVERS`; its own where empty.
      grid: of mar, from `diffusion.grids.GRIDS`; its own where empty.
      solver_steps: of mar, in each of its `steps`; 0 for its own.
    """

    guidance: float = 1.0
    guidance_schedule: str = ""
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    steps: int = 0
    choice_temperature: float = -1.0
    solver: str = ""
    grid: str = ""
    solver_steps: int = 0

    def __post_init__(self) -> None:
        for name in ("guidance", "temperature", "top_k", "steps", "solver_steps"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"sample.{name}", value, "must be a number from 0 on")
        require(0.0 < self.top_p <= 1.0, "sample.top_p", self.top_p, "must lie in (0, 1]")
        for name in ("top_k", "steps"):
            require(getattr(self, name) < 2**31, f"sample.{name}", getattr(self, name), "must be below 2^31")
        known = ("", "constant", "linear")
        rule = "must be constant, linear or empty"
        require(self.guidance_schedule in known, "sample.guidance_schedule", self.guidance_schedule, rule)
        fine = self.choice_temperature == -1.0 or 0.0 <= self.choice_temperature < math.inf
        require(fine, "sample.choice_temperature", self.choice_temperature, "must be a number from 0 on, or -1")


# ---------------------------------------------------------------------------------------------- how it is built


def build(settings: FamilySettings, spec: ImageSpec, precision: str, tokenizer: Tokenizer | None = None) -> Family:
    """The family for images of `spec`, computing in `precision`; `tokenizer` is the trained one that it is over.

    Raises:
      UserError: for an unknown row or option, or rows that do not fit together.
    """
    tokenizer = tokenizers.build("family.tokenizer", settings.tokenizer, spec, tokenizer)
    stage = Stage(tokenizer=tokenizer, by_vectors=_by_vectors(settings))
    tokens = _tokens(stage, spec.num_classes)
    network = sequence.build("family.network", settings.network, tokens, precision)
    given = {"network": network, "tokens": tokens, "scales": tokenizer.scales}
    return Model(
        spec=spec,
        stage=stage,
        decoding=plugs.build("family.decoding", settings.decoding, DECODINGS, **given),
        init_network=network.init,
        label_dropout=settings.label_dropout,
        label_smoothing=settings.label_smoothing,
    ).family()


def _by_vectors(settings: FamilySettings) -> bool:
    """Whether the way of decoding models the tokenizer's vectors, and not its tokens."""
    if DECODINGS.get(plugs.parse("family.decoding", settings.decoding)[0]) is not MAR:
        return False
    rule = "mar has no tokens to smooth; leave it out"
    require(settings.label_smoothing == 0.0, "family.label_smoothing", settings.label_smoothing, rule)
    return True


def _tokens(stage: Stage, num_classes: int) -> TokenSpec:
    """What the network has to know of the tokens or vectors."""
    it = stage.tokenizer
    if stage.by_vectors:
        return TokenSpec(grid=(*it.grid[:2], 1), vocabulary=0, channels=it.width, num_classes=num_classes)
    sides = it.scales.sides if it.scales else ()
    return TokenSpec(
        grid=it.grid, vocabulary=it.vocabulary, channels=it.channels, num_classes=num_classes, scales=sides
    )


@dataclass(frozen=True, kw_only=True)
class Model:
    """The parts, put together. `spec.num_classes` is the label that stands for no label."""

    spec: ImageSpec
    stage: Stage
    decoding: Autoregressive | MaskGIT | MAR | VAR
    init_network: Callable[[Array], Tree]
    label_dropout: float
    label_smoothing: float

    def family(self) -> Family:
        """What everyone else sees of the model."""
        likely = isinstance(self.decoding, Autoregressive | VAR) and self.stage.tokenizer.exact
        return Family(
            name="transformer",
            players=(Player(name="transformer", loss=self.loss),),
            init=self.init,
            generate=self.generate,
            sampling=self.sampling,
            nll=self.nll if likely else None,
            bound=isinstance(self.decoding, VAR),
            edits={"inpaint": self.inpaint} if isinstance(self.decoding, MaskGIT | MAR) else {},
            counted=self.counted,
            first_stage=self.stage.first_stage(self.shape),
            run=lambda weights, condition: self.decoding.run(weights["transformer"], condition.get("label")),
        )

    def init(self, key: Array) -> tuple[Weights, Tree]:
        """The network is the one player; there is no extra state."""
        return {"transformer": self.init_network(key)}, {}

    @property
    def shape(self) -> tuple[int, ...]:
        """(h, w, d) of an image's tokens, (L,) of those of all scales, or (h, w, channels) of its vectors."""
        tokens = self.decoding.tokens
        return (*tokens.grid[:2], tokens.channels) if self.stage.by_vectors else self.stage.tokenizer.shape

    def way(self, frozen: Mapping[str, Tree]) -> Autoregressive | MaskGIT | MAR | VAR:
        """The way of decoding; VAR's asks the tokenizer, whose parameters may be `frozen`, what tokens amount to."""
        return self.decoding.over(params_of(frozen)) if isinstance(self.decoding, VAR) else self.decoding

    def read(self, frozen: Mapping[str, Tree], batch: Batch) -> Array:
        """The images of a batch as tokens i32[B,T], place after place, or vectors f32[B,T,channels]."""
        tokens = self.stage.read(frozen, batch)
        channels = self.shape[2:] if self.stage.by_vectors else ()
        return tokens.reshape(len(tokens), self.decoding.tokens.length, *channels)

    def decode(self, weights: Weights, tokens: Array) -> Array:
        """What `read` gives as images f32[n,H,W,C] in [-1, 1]."""
        return self.stage.decode(weights, tokens.reshape(len(tokens), *self.shape))

    # ------------------------------------------------------------------------------------------ training

    def loss(self, params: Weights, ctx: Context) -> tuple[Array, Aux]:
        """Nats a token, in the mean over the batch; some labels are hidden, so that guidance can be learned."""
        keys = rng.example_keys(ctx.key, ctx.batch["index"])
        label = self.hide_labels(ctx.batch, rng.fold(keys, 0))
        tokens = self.read(ctx.frozen, ctx.batch)
        losses, metrics = self.way(ctx.frozen).losses(
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
        draw = lambda shown: self.way(weights).generate(weights["transformer"], keys, shown, options)
        return self.decode(weights, self.guided(draw, condition, options))

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
        given, name = asdict(settings), type(self.decoding).__name__
        for field, default in asdict(SampleSettings()).items():
            fine = field in self.decoding.reads or given[field] == default
            require(fine, f"sample.{field}", given[field], f"{name} decoding does not read it; leave it out")
        given |= {"guidance": jnp.float32(settings.guidance), "temperature": jnp.float32(settings.temperature)}
        given |= {"top_k": jnp.int32(settings.top_k), "top_p": jnp.float32(settings.top_p)}
        return self.decoding.options(**{field: given[field] for field in self.decoding.reads})

    def inpaint(self, weights: Weights, keys: Array, inputs: Mapping[str, Array], options: Options) -> Array:
        """Make the pixels of `image` that are not `known` bool[n,H,W,1], under `label`.

        A token is kept where all its pixels are known; in the result the known pixels are the image's own.
        """
        image, (h, w, d) = inputs["image"], self.decoding.tokens.grid
        seen = jnp.where(inputs["known"], image, 0.0)  # what is made anew must not shine through the known tokens
        tokens = self.read(weights, {"image": seen})
        known = jnp.all(inputs["known"].reshape(len(image), h, image.shape[1] // h, w, -1), axis=(2, 4))
        known = jnp.repeat(known.reshape(len(image), h * w), d, axis=1)

        def draw(shown: Shown) -> Array:
            return self.decoding.inpaint(weights["transformer"], tokens, known, rng.fold(keys, 1), shown, options)

        return jnp.where(inputs["known"], image, self.decode(weights, self.guided(draw, inputs, options)))

    # ------------------------------------------------------------------------------------------ likelihood

    def nll(self, weights: Weights, batch: Batch, key: Array) -> Array:
        """Bits per dimension f32[B] of the batch's images under their labels, of which nothing is drawn by `key`.

        They are those of the images' tokens. Where tokens and images are the same thing that is exact. The tokens of
        scales follow from the image, so that p(image) is the sum over all tokens that `decode` makes this image of, the
        image's own among them: -log p(its tokens) is an upper bound of -log p(image), and tight where the model gives
        nothing to tokens that are no image's.
        """
        label = batch["label"] if self.spec.num_classes else None
        tokens = self.read(weights, batch)
        nats = self.way(weights).nats(weights["transformer"], tokens, label)
        return grey.bits_per_dimension(nats, math.prod(self.spec.shape))
