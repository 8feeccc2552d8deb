"""Two networks that play against each other: one makes images out of noise, one tells them from real ones."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax import plugs
from diffusion_jax.errors import require
from diffusion_jax.networks import DTYPES, presets
from diffusion_jax.networks.gan import dcgan, r3gan, resnet, stylegan2
from diffusion_jax.types import Array, ImageSpec, Tree


@dataclass(frozen=True, kw_only=True)
class Style:
    """A generator in two parts, G(z) = synthesis(mapping(z)): between them the style w may be changed.

    Attributes:
      mapping: (params, z f32[n,latent], label i32[n] or None) -> w f32[n,...].
      synthesis: (params, w, keys key[n] or None) -> f32[n,H,W,C].
    """

    mapping: Callable[[Tree, Array, Array | None], Array]
    synthesis: Callable[[Tree, Array, Array | None], Array]


@dataclass(frozen=True, kw_only=True)
class Generator:
    """Noise to images.

    Attributes:
      init: key -> parameters, float32.
      apply: (params, z f32[n,latent], label i32[n] or None, keys key[n] or None) -> f32[n,H,W,C], image i from row i of
        each alone. Within [-1, 1] where the paper's network ends in tanh. `keys` are of noise beside z, where a network
        has it; none is added without them.
      latent: numbers in z, which are standard normal.
      unfit: why spectral normalisation of its kernels would mean nothing, or "".
      style: the same as two functions, where the network has a mapping; else None.
    """

    init: Callable[[Array], Tree]
    apply: Callable[[Tree, Array, Array | None, Array | None], Array]
    latent: int
    unfit: str = ""
    style: Style | None = None


@dataclass(frozen=True, kw_only=True)
class Discriminator:
    """Images to logits, large for real ones.

    Attributes:
      init: key -> parameters, float32.
      apply: (params, x f32[n,H,W,C], label i32[n] or None) -> f32[n].
      unfit: as of the generator.
    """

    init: Callable[[Array], Tree]
    apply: Callable[[Tree, Array, Array | None], Array]
    unfit: str = ""


GENERATORS = {
    "dcgan": (dcgan.GeneratorOptions, dcgan.Generator, dcgan.size_error),
    "r3gan": (r3gan.GeneratorOptions, r3gan.Generator, r3gan.size_error),
    "resnet": (resnet.GeneratorOptions, resnet.Generator, resnet.generator_size_error),
    "stylegan2": (stylegan2.GeneratorOptions, stylegan2.Generator, stylegan2.size_error),
}
"""name -> (options, module, what is wrong with an image size).

A module is made of (options, image spec, dtype) and called with (z, label, keys); its options have a field `latent`.
One with a mapping has methods `mapping` (z, label) and `synthesis` (w, keys), too.
"""

DISCRIMINATORS = {
    "dcgan": (dcgan.DiscriminatorOptions, dcgan.Discriminator, dcgan.size_error),
    "r3gan": (r3gan.DiscriminatorOptions, r3gan.Discriminator, r3gan.size_error),
    "resnet": (resnet.DiscriminatorOptions, resnet.Discriminator, resnet.discriminator_size_error),
    "stylegan2": (stylegan2.DiscriminatorOptions, stylegan2.Discriminator, stylegan2.size_error),
}
"""name -> (options, module, what is wrong with an image size), as above; the module is called with (x, label)."""

UNFIT = {
    "stylegan2": "stylegan2 scales its kernels again where it uses them",
    "r3gan": "r3gan's blocks begin with kernels of 0, which have no norm to be divided by",
}
"""name -> why spectral normalisation of its kernels, before it sees them, would mean nothing."""


def build_generator(field: str, text: str, spec: ImageSpec, precision: str = "float32") -> Generator:
    """The generator that `text` names, for images of `spec`; with classes where `spec` has them.

    Args:
      field: the config field, for error messages.
      text: such as `"dcgan(width=64)"` or `"stylegan2-256"`.
      spec: size, channels and classes of the images.
      precision: "float32" or "bfloat16", the arithmetic's; parameters are float32.

    Raises:
      UserError: for an unknown name or option, or sizes that do not fit `spec`.
    """
    name, model = _module(field, text, GENERATORS, presets.GENERATOR_TEXTS, spec, precision)
    z = jnp.zeros((1, model.options.latent))

    def init(key: Array) -> Tree:
        return model.init(key, z, _label(spec), None)["params"]

    def apply(params: Tree, z: Array, label: Array | None, keys: Array | None = None) -> Array:
        return model.apply({"params": params}, z, label, keys).astype(jnp.float32)

    def mapping(params: Tree, z: Array, label: Array | None) -> Array:
        return model.apply({"params": params}, z, label, method="mapping")

    def synthesis(params: Tree, w: Array, keys: Array | None = None) -> Array:
        return model.apply({"params": params}, w, keys, method="synthesis").astype(jnp.float32)

    return Generator(
        init=init,
        apply=jax.named_call(apply, name="generator"),
        latent=model.options.latent,
        unfit=UNFIT.get(name, ""),
        style=Style(mapping=mapping, synthesis=synthesis) if hasattr(model, "mapping") else None,
    )


def build_discriminator(field: str, text: str, spec: ImageSpec, precision: str = "float32") -> Discriminator:
    """The discriminator that `text` names; arguments and errors as of `build_generator`."""
    name, model = _module(field, text, DISCRIMINATORS, presets.DISCRIMINATOR_TEXTS, spec, precision)

    def init(key: Array) -> Tree:
        return model.init(key, jnp.zeros((1, *spec.shape)), _label(spec))["params"]

    def apply(params: Tree, x: Array, label: Array | None) -> Array:
        return model.apply({"params": params}, x, label).astype(jnp.float32)

    return Discriminator(init=init, apply=jax.named_call(apply, name="discriminator"), unfit=UNFIT.get(name, ""))


def _label(spec: ImageSpec) -> Array | None:
    """A label to initialise with, where there are classes."""
    return jnp.zeros((1,), jnp.int32) if spec.num_classes else None


def _module(
    field: str, text: str, table: dict, texts: Mapping[str, str], spec: ImageSpec, precision: str
) -> tuple[str, Any]:
    """The row and the module that `text` names in `table`, or as one of the presets `texts`, for images of `spec`."""
    name, given = presets.expand(field, text, texts)
    require(name in table, field, text, f"there is no {name!r}; {plugs.suggest(name, {**table, **texts})}")
    options_of, module, misfit = table[name]
    options = plugs.call(field, options_of, given, label=name)
    problem = misfit(options, spec.size)
    require(not problem, field, text, problem)
    return name, module(options, spec, DTYPES[precision])
