"""Autoencoders for variational training: arrays in, arrays out.

Both have one interface. The latents of all levels are spoken of as noises: latent = mu + sigma noise, with mu and sigma
of the prior, which may depend on the levels above. So p(noise) = N(0, 1) for every number of every level, whatever
stands above, and q(noise | x) = N(mean, std^2) is a posterior relative to its prior. A flat autoencoder has one level,
where mu = 0 and sigma = 1.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from diffusion_jax import plugs
from diffusion_jax.errors import require
from diffusion_jax.networks import DTYPES
from diffusion_jax.networks.vae import flat, ladder
from diffusion_jax.networks.vae.blocks import Inferred, size_error
from diffusion_jax.types import Array, ImageSpec, Tree


@dataclass(frozen=True, kw_only=True)
class Autoencoder:
    """Pure functions. D numbers are an image's latents, in levels from the coarsest to the finest.

    Attributes:
      init: key -> parameters, float32.
      infer: (params, x f32[B,H,W,C], label i32[B] or None, eps f32[B,D]) -> `Inferred`: the posterior q(noise | x),
        that of a level given the noises mean + std eps of those above it, and the decoder's output at all of them.
      decode: (params, noise f32[B,D], label i32[B] or None) -> the decoder's output f32[B,H,W,P].
      levels: how many of the D numbers each level has.
    """

    init: Callable[[Array], Tree]
    infer: Callable[[Tree, Array, Array | None, Array], Inferred]
    decode: Callable[[Tree, Array, Array | None], Array]
    levels: tuple[int, ...]


AUTOENCODERS = {
    "flat": (flat.FlatOptions, flat.Flat, flat.level_sizes),
    "ladder": (ladder.LadderOptions, ladder.Ladder, ladder.level_sizes),
}
"""name -> (options, module, sizes of the levels for an image size)."""


def build(field: str, text: str, spec: ImageSpec, precision: str, outputs: int) -> Autoencoder:
    """The autoencoder that `text` names, for images of `spec`.

    Args:
      field: the config field, for error messages.
      text: such as `"ladder(channels=64,levels=(2,2,1))"`.
      spec: size, channels and classes of the images.
      precision: "float32" or "bfloat16", the arithmetic's; parameters are float32.
      outputs: P, numbers a pixel that the decoder gives.

    Raises:
      UserError: for an unknown name or option, or sizes that do not fit `spec`.
    """
    name, given = plugs.parse(field, text)
    require(name in AUTOENCODERS, field, text, f"there is no {name!r}; {plugs.suggest(name, AUTOENCODERS)}")
    options_of, module, level_sizes = AUTOENCODERS[name]
    options = plugs.call(field, options_of, given, label=name)
    problem = size_error(options, spec.size)
    require(not problem, field, text, problem)
    model = module(options, spec.size, outputs, spec.num_classes, DTYPES[precision])
    levels = level_sizes(options, spec.size)

    def init(key: Array) -> Tree:
        label = jnp.zeros((1,), jnp.int32) if spec.num_classes else None
        return model.init(key, jnp.zeros((1, *spec.shape)), label, jnp.zeros((1, sum(levels))))["params"]

    def infer(params: Tree, x: Array, label: Array | None, eps: Array) -> Inferred:
        return model.apply({"params": params}, x, label, eps)

    def decode(params: Tree, noise: Array, label: Array | None) -> Array:
        return model.apply({"params": params}, None, label, noise).pixels

    return Autoencoder(
        init=init,
        infer=jax.named_call(infer, name=f"{name}_infer"),
        decode=jax.named_call(decode, name=f"{name}_decode"),
        levels=levels,
    )
