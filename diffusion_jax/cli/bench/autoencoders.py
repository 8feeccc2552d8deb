"""`--what=flops` of an autoencoder for variational training; nothing is computed."""

from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax import plugs, tree
from diffusion_jax.cli.bench.instruments import gflops
from diffusion_jax.cli.bench.network import images
from diffusion_jax.families.vae import FamilySettings
from diffusion_jax.networks import flops as count
from diffusion_jax.networks import vae
from diffusion_jax.variational.likelihoods import LIKELIHOODS


def known(text: str) -> bool:
    """Whether `text` names an autoencoder for variational training."""
    return plugs.parse("--network", text)[0] in vae.AUTOENCODERS


def flops(text: str, image_size: int | None, channels: int | None, num_classes: int | None) -> dict[str, Any]:
    """Parameters, and 1e-9 times the multiply-adds of one image's pass through encoder and decoder, three ways.

    `decoder_gflops` are those of a sample. The decoder gives what the family's own distribution of pixels asks for.

    Raises:
      UserError: without an image size, for unknown options, or sizes that do not fit.
    """
    image = images(text, None, image_size, channels, num_classes)
    pixels = plugs.build(
        "--network", FamilySettings().pixels, LIKELIHOODS, channels=image.channels, levels=image.levels
    )
    network = vae.build("--network", text, image, "float32", pixels.outputs)
    params = jax.eval_shape(network.init, jax.random.key(0))
    x, noise = (jax.ShapeDtypeStruct((1, *shape), jnp.float32) for shape in (image.shape, (sum(network.levels),)))
    label = jax.ShapeDtypeStruct((1,), jnp.int32) if image.num_classes else None
    return {
        "network": text,
        "params": tree.count(params),
        "latents": sum(network.levels),
        **gflops(count.counts_of(network.infer, params, x, label, noise)),
        "decoder_gflops": count.multiply_adds_of(network.decode, params, noise, label) / 1e9,
    }
