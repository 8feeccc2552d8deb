"""Transformers over the tokens of images: arrays in, arrays out.

Four kinds, by what a token is told of the others. Each has a training pass over a whole sequence, and what its way of
generating asks for beside it, with the same parameters:

    Causal   the tokens before it                               one step a token, with a cache
    Masked   the tokens that are not masked                     the training pass itself
    Scales   the tokens of coarser scales                       one step a scale, with a cache
    Places   the latents that are not masked                    a vector a place, and a denoiser of its latent
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_jax import plugs
from diffusion_jax.errors import require
from diffusion_jax.networks import DTYPES, presets
from diffusion_jax.networks.sequence import gpt, mar, maskgit, var
from diffusion_jax.networks.transformer import Cache
from diffusion_jax.types import Array, TokenSpec, Tree

Label = Array | None
"""i32[B]; `num_classes` stands for "no label". None for data without classes."""


@dataclass(frozen=True, kw_only=True)
class Sequence:
    """What all kinds have. T = h w d tokens in raster order, V of them different.

    Attributes:
      init: key -> parameters, float32.
      apply: (params, *inputs, keys key[B] or None) -> f32[...]; `keys` switch dropout on.
      example: shapes of the inputs for one image.
    """

    init: Callable[[Array], Tree]
    apply: Callable[..., Array]
    example: tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class Causal(Sequence):
    """Tokens in raster order, each given those before it.

    Attributes:
      apply: (params, tokens i32[B,T], label, keys) -> logits f32[B,T,V], of token t given tokens 0, ..., t - 1.
      begin: (count) -> an empty cache of `count` sequences.
      step: (params, token i32[B], label, cache) -> (logits f32[B,V] of the next token, cache). `token` is the one that
        the step before gave logits of; the first step does not look at it.
    """

    begin: Callable[[int], Cache]
    step: Callable[[Tree, Array, Label, Cache], tuple[Array, Cache]]


@dataclass(frozen=True, kw_only=True)
class Masked(Sequence):
    """All tokens at once, given those that are not masked.

    Attributes:
      apply: (params, tokens i32[B,T], label, keys) -> logits f32[B,T,V]; the token V is the mask.
    """


@dataclass(frozen=True, kw_only=True)
class Scales(Sequence):
    """Tokens of the scales h_k x h_k, L together, those of a scale given all before it, as what these amount to.

    Attributes:
      apply: (params, vectors f32[B,L-1,channels] of scales 2, ..., K, label, keys) -> logits f32[B,L,V].
      begin: (count) -> an empty cache of `count` sequences.
      step: (params, vectors f32[B,n,channels] of the next scale, label, cache) -> (its logits f32[B,n,V], cache). The
        first step, of one token, does not look at them.
    """

    begin: Callable[[int], Cache]
    step: Callable[[Tree, Array, Label, Cache], tuple[Array, Cache]]


@dataclass(frozen=True, kw_only=True)
class Places(Sequence):
    """A vector for each place, given the latents that are not masked, and a denoiser that is told of it.

    Attributes:
      apply: (params, latents f32[B,T,channels], masked bool[B,T], label, x f32[B,T,channels], time f32[B,T]) ->
        `denoise` of x and time under `encode` of the others.
      encode: (params, latents, masked, label, keys) -> z [B,T,width].
      denoise: (params, x f32[...,channels], time f32[...] in [0, 1], z [...,width]) -> f32[...,2 channels]: the noise
        in x, and what its variance is learned by.
    """

    encode: Callable[..., Array]
    denoise: Callable[[Tree, Array, Array, Array], Array]


# ---------------------------------------------------------------------------------------------- how they are built


def _error(options: Any, tokens: TokenSpec) -> str:
    """Why a network of one grid of discrete tokens does not fit, or ""."""
    if tokens.scales:
        return "is for one grid of tokens, and this tokenizer has several scales"
    return "" if tokens.vocabulary else "is for discrete tokens, and this tokenizer has continuous latents"


def _var_error(options: var.VAROptions, tokens: TokenSpec) -> str:
    return "" if tokens.scales else "is for tokens of several scales, and this tokenizer has one grid"


def _mar_error(options: mar.MAROptions, tokens: TokenSpec) -> str:
    return "is for continuous latents, and this tokenizer has discrete tokens" if tokens.vocabulary else ""


def _causal(model: nn.Module) -> Causal:
    given = _of_tokens(model)
    return Causal(
        **_whole(model, *given),
        begin=lambda count: _empty(model, count, model.tokens.length),
        step=_step(model),
        example=given,
    )


def _masked(model: nn.Module) -> Masked:
    given = _of_tokens(model)
    return Masked(**_whole(model, *given), example=given)


def _scales(model: nn.Module) -> Scales:
    length = model.tokens.length
    given = (_shape(1, length - 1, model.tokens.channels), _label(model))
    return Scales(
        **_whole(model, *given),
        begin=lambda count: _empty(model, count, length),
        step=_step(model),
        example=given,
    )


def _places(model: nn.Module) -> Places:
    T, channels = model.tokens.length, model.tokens.channels
    latents = _shape(1, T, channels)
    given = (latents, _shape(1, T, dtype=bool), _label(model), latents, _shape(1, T))

    def encode(params: Tree, latents: Array, masked: Array, label: Label, keys: Array | None = None) -> Array:
        return model.apply({"params": params}, latents, masked, label, keys, method="encode")

    def denoise(params: Tree, x: Array, time: Array, z: Array) -> Array:
        return model.apply({"params": params}, x, time, z, method="denoise")

    return Places(**_whole(model, *given), encode=encode, denoise=denoise, example=given)


def _shape(*sizes: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def _label(model: nn.Module) -> jax.ShapeDtypeStruct | None:
    return _shape(1, dtype=jnp.int32) if model.tokens.num_classes else None


def _of_tokens(model: nn.Module) -> tuple[Any, ...]:
    return _shape(1, model.tokens.length, dtype=jnp.int32), _label(model)


def _whole(model: nn.Module, *given: Any) -> dict[str, Callable]:
    """The functions `init` and `apply`, for inputs of the shapes `given`."""

    def init(key: Array) -> Tree:
        return model.init(key, *jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), given))["params"]

    def apply(params: Tree, *inputs: Any) -> Array:
        return model.apply({"params": params}, *inputs).astype(jnp.float32)

    return {"init": init, "apply": jax.named_call(apply, name=type(model).__name__.lower())}


def _step(model: nn.Module) -> Callable:
    def step(params: Tree, inputs: Array, label: Label, cache: Cache) -> tuple[Array, Cache]:
        logits, cache = model.apply({"params": params}, inputs, label, None, cache)
        return logits.astype(jnp.float32), cache

    return step


def _empty(model: nn.Module, count: int, length: int) -> Cache:
    o = model.options
    pairs = jnp.zeros((o.depth, 2, count, length, o.heads, o.width // o.heads), model.dtype)
    return Cache(pairs, jnp.int32(0))


NETWORKS = {
    "gpt": (gpt.GPTOptions, gpt.GPT, _error, _causal),
    "mar": (mar.MAROptions, mar.MAR, _mar_error, _places),
    "maskgit": (maskgit.MaskGITOptions, maskgit.MaskGIT, _error, _masked),
    "var": (var.VAROptions, var.VAR, _var_error, _scales),
}
"""name -> (options, module, what is wrong with tokens for it, its kind)."""


def build(field: str, text: str, tokens: TokenSpec, precision: str = "float32") -> Sequence:
    """The network that `text` names, for `tokens`: of one of the four kinds.

    Args:
      field: the config field, for error messages.
      text: such as `"gpt(width=128,depth=6)"` or `"llamagen-b"`.
      tokens: what they are, and classes.
      precision: "float32" or "bfloat16", the arithmetic's; parameters are float32.

    Raises:
      UserError: for an unknown name or option, or one that does not fit `tokens`.
    """
    name, given = presets.expand(field, text, presets.SEQUENCE_TEXTS)
    known = {**NETWORKS, **presets.SEQUENCES}
    require(name in NETWORKS, field, text, f"there is no {name!r}; {plugs.suggest(name, known)}")
    options_of, module, misfit, kind = NETWORKS[name]
    options = plugs.call(field, options_of, given, label=name)
    problem = misfit(options, tokens)
    require(not problem, field, text, problem)
    return kind(module(options, tokens, DTYPES[precision]))
