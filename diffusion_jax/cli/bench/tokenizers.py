"""`--what=flops` of a tokenizer, or of the discriminator that it is trained against; nothing is computed."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax import plugs, tree
from diffusion_jax.cli.bench.network import images
from diffusion_jax.networks import flops as count
from diffusion_jax.networks import tokenizer as networks
from diffusion_jax.networks.presets import FIRST_STAGES
from diffusion_jax.tokenizers import bottlenecks
from diffusion_jax.tokenizers.autoencoder import Autoencoder
from diffusion_jax.types import ImageSpec

JUDGED = ImageSpec(size=256, channels=3, num_classes=0)
"""What a discriminator is counted on where nothing else is said."""


def known(text: str) -> bool:
    """Whether `text` names a tokenizer's preset, or a discriminator of patches."""
    return plugs.parse("--network", text)[0] in {*FIRST_STAGES, *networks.DISCRIMINATORS}


def flops(text: str, image_size: int | None, channels: int | None, num_classes: int | None) -> dict[str, Any]:
    """Parameters, the codebook's among them, and 1e-9 times the multiply-adds of one image's way there and back.

    Raises:
      UserError: for unknown options, or sizes that do not fit.
    """
    name, _ = plugs.parse("--network", text)
    published = FIRST_STAGES[name].image if name in FIRST_STAGES else JUDGED
    image = images(text, published, image_size, channels, num_classes)
    return {"network": text} | (of_tokenizer(text, name, image) if name in FIRST_STAGES else of_judge(text, image))


def of_tokenizer(text: str, name: str, image: ImageSpec) -> dict[str, Any]:
    """Of the tokenizer `text`, whose preset is `name`."""
    between = bottlenecks.build("--network", name, math.prod(image.shape))
    codec = networks.build("--network", text, image, "float32", between.latents, between.outputs)
    built = Autoencoder(codec=codec, bottleneck=between)
    params, _ = jax.eval_shape(built.init, jax.random.key(0))
    x = jax.ShapeDtypeStruct((1, *image.shape), jnp.float32)
    given = jax.eval_shape(lambda params, x: built.encode(params, x, None), params, x)
    there = count.multiply_adds_of(built.codec.encode, params, x) / 1e9
    back = count.multiply_adds_of(built.decode, params, given) / 1e9
    return {
        "params": tree.count(params),
        "grid": list(built.grid),
        "vocabulary": built.vocabulary,
        "latents": built.bottleneck.latents,
        "gflops": there + back,
        "encoder_gflops": there,
        "decoder_gflops": back,
    }


def of_judge(text: str, image: ImageSpec) -> dict[str, Any]:
    """Of the discriminator `text`."""
    judge = networks.build_discriminator("--network", text, image, "float32")
    params = jax.eval_shape(judge.init, jax.random.key(0))
    x = jax.ShapeDtypeStruct((1, *image.shape), jnp.float32)
    return {"params": tree.count(params), "gflops": count.multiply_adds_of(judge.apply, params, x) / 1e9}
