"""`--what=flops` of two networks that play against each other; nothing is computed."""

from typing import Any

from diffusion_jax import plugs, tree
from diffusion_jax.cli.bench.network import images
from diffusion_jax.networks import flops as count
from diffusion_jax.networks import gan
from diffusion_jax.networks.presets import PAIRS


def known(text: str) -> bool:
    """Whether `text` names a generator and a discriminator: a preset, or a row of both tables."""
    return plugs.parse("--network", text)[0] in {*PAIRS, *gan.GENERATORS}


def flops(text: str, image_size: int | None, channels: int | None, num_classes: int | None) -> dict[str, Any]:
    """Of each network its parameters, and 1e-9 times the multiply-adds of one image's pass, counted three ways.

    Raises:
      UserError: for a row that is no preset and without an image size, unknown options, or sizes that do not fit.
    """
    pair = PAIRS.get(plugs.parse("--network", text)[0])
    image = images(text, pair and pair.image, image_size, channels, num_classes)
    generator = gan.build_generator("--network", text, image)
    discriminator = gan.build_discriminator("--network", text, image)
    shapes = count.shapes_of_pair(generator, discriminator, image)
    result = {"network": text}
    for name, apply, given in zip(
        ("generator", "discriminator"), (generator.apply, discriminator.apply), shapes, strict=True
    ):
        result |= {
            f"{name}_params": tree.count(given[0]),
            f"{name}_gflops": count.multiply_adds_of(apply, *given) / 1e9,
            f"{name}_gflops_compiled": count.compiled_multiply_adds_of(apply, *given) / 1e9,
            f"{name}_gflops_cost_analysis": count.cost_analysis_of(apply, *given) / 1e9,
        }
    return result
