"""Codecs: an encoder and a decoder around a bottleneck, which is no part of them. Arrays in, arrays out."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from diffusion_jax import plugs, rng
from diffusion_jax.errors import require
from diffusion_jax.networks import DTYPES, patchgan, presets, unet
from diffusion_jax.networks.tokenizer import maskgit, vqgan
from diffusion_jax.networks.vae import blocks
from diffusion_jax.types import Array, ImageSpec, Tree


@dataclass(frozen=True, kw_only=True)
class Codec:
    """Pure functions; the 1x1 convolutions beside the bottleneck are the codec's.

    Attributes:
      init: key -> parameters, float32, of "encoder" and "decoder". The decoder's last layer, which makes the image, is
        "out/conv" in it.
      encode: (params, x f32[B,H,W,C]) -> f32[B,h,w,outputs], what the bottleneck is given.
      decode: (params, z f32[B,h,w,latents]) -> f32[B,H,W,C]; nothing keeps it in [-1, 1].
      grid: (h, w).
    """

    init: Callable[[Array], Tree]
    encode: Callable[[Tree, Array], Array]
    decode: Callable[[Tree, Array], Array]
    grid: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Discriminator:
    """Images to logits of their patches, large for real ones.

    Attributes:
      init: key -> parameters, float32.
      apply: (params, x f32[n,H,W,C]) -> f32[n,h,w].
    """

    init: Callable[[Array], Tree]
    apply: Callable[[Tree, Array], Array]


CODECS = {
    "maskgit": (maskgit.MaskGITOptions, maskgit, blocks.size_error),
    "vqgan": (vqgan.VQGANOptions, vqgan, unet.size_error),
}
"""name -> (options, file with the modules `Encoder` and `Decoder`, what is wrong with an image size).

Options have `multipliers`, each further one of which halves the image's side.
"""

DISCRIMINATORS = {"patchgan": (patchgan.PatchGANOptions, patchgan.PatchGAN, patchgan.size_error)}
"""name -> (options, module, what is wrong with an image size)."""


def build(field: str, text: str, spec: ImageSpec, precision: str, latents: int, outputs: int) -> Codec:
    """The codec that `text` names, for images of `spec`.

    Args:
      field: the config field, for error messages.
      text: such as `"vqgan(channels=64,multipliers=(1,2))"` or `"kl-f8"`.
      spec: size and channels of the images; no codec here looks at labels.
      precision: "float32" or "bfloat16", the arithmetic's; parameters are float32.
      latents: numbers a place that the bottleneck hands to the decoder.
      outputs: numbers a place that it asks of the encoder.

    Raises:
      UserError: for an unknown name or option, or sizes that do not fit `spec`.
    """
    name, given = presets.expand(field, text, presets.CODEC_TEXTS)
    known = {**CODECS, **presets.CODEC_TEXTS}
    require(name in CODECS, field, text, f"there is no {name!r}; {plugs.suggest(name, known)}")
    options_of, modules, misfit = CODECS[name]
    options = plugs.call(field, options_of, given, label=name)
    problem = misfit(options, spec.size)
    require(not problem, field, text, problem)
    encoder = modules.Encoder(options, outputs, DTYPES[precision])
    decoder = modules.Decoder(options, spec.channels, DTYPES[precision])
    side = spec.size >> (len(options.multipliers) - 1)

    def init(key: Array) -> Tree:
        of_encoder = encoder.init(rng.stream(key, "encoder"), jnp.zeros((1, *spec.shape)))
        of_decoder = decoder.init(rng.stream(key, "decoder"), jnp.zeros((1, side, side, latents)))
        return {"encoder": of_encoder["params"], "decoder": of_decoder["params"]}

    def encode(params: Tree, x: Array) -> Array:
        return encoder.apply({"params": params["encoder"]}, x).astype(jnp.float32)

    def decode(params: Tree, z: Array) -> Array:
        return decoder.apply({"params": params["decoder"]}, z).astype(jnp.float32)

    return Codec(
        init=init,
        encode=jax.named_call(encode, name=f"{name}_encode"),
        decode=jax.named_call(decode, name=f"{name}_decode"),
        grid=(side, side),
    )


def build_discriminator(field: str, text: str, spec: ImageSpec, precision: str) -> Discriminator:
    """The discriminator that `text` names; `field`, `spec`, `precision` and errors as of `build`."""
    name, given = plugs.parse(field, text)
    require(name in DISCRIMINATORS, field, text, f"there is no {name!r}; {plugs.suggest(name, DISCRIMINATORS)}")
    options_of, module, misfit = DISCRIMINATORS[name]
    options = plugs.call(field, options_of, given, label=name)
    problem = misfit(options, spec.size)
    require(not problem, field, text, problem)
    model = module(options, DTYPES[precision])

    def init(key: Array) -> Tree:
        return model.init(key, jnp.zeros((1, *spec.shape)))["params"]

    def apply(params: Tree, x: Array) -> Array:
        return model.apply({"params": params}, x)

    return Discriminator(init=init, apply=jax.named_call(apply, name=name))
