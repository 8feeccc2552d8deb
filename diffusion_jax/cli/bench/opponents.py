"""`--what=flops` of two networks that play against each other; nothing is computed."""

from dataclasses import fields
from typing import Any

from diffusion_jax import plugs, tree
from diffusion_jax.cli.bench.instruments import gflops
from diffusion_jax.cli.bench.network import images
from diffusion_jax.errors import UserError
from diffusion_jax.networks import flops as count
from diffusion_jax.networks import gan
from diffusion_jax.networks.presets import GENERATOR_TEXTS, PAIRS, expand


def known(text: str) -> bool:
    """Whether `text` names a generator and a discriminator: a preset, or a row of both tables."""
    return plugs.parse("--network", text)[0] in {*PAIRS, *gan.GENERATORS}


def flops(text: str, image_size: int | None, channels: int | None, num_classes: int | None) -> dict[str, Any]:
    """Of both networks together and of each, parameters and 1e-9 times the multiply-adds of one image's pass.

    Those of each are counted three ways; the sums are `params` and `gflops`.

    Raises:
      UserError: for a row that is no preset and without an image size, unknown options, or sizes that do not fit.
    """
    pair = PAIRS.get(plugs.parse("--network", text)[0])
    image = images(text, pair and pair.image, image_size, channels, num_classes)
    texts = sides(text)
    generator = gan.build_generator("--network", texts[0], image)
    discriminator = gan.build_discriminator("--network", texts[1], image)
    shapes = count.shapes_of_pair(generator, discriminator, image)
    parts = {
        name: {"params": tree.count(given[0])} | gflops(count.counts_of(apply, *given))
        for name, apply, given in zip(
            ("generator", "discriminator"), (generator.apply, discriminator.apply), shapes, strict=True
        )
    }
    total = {key: sum(part[key] for part in parts.values()) for key in ("params", "gflops")}
    named = {f"{name}_{key}": value for name, part in parts.items() for key, value in part.items()}
    return {"network": text} | total | named


def sides(text: str) -> tuple[str, str]:
    """The generator and the discriminator that `text` names, each with those of its options that it has.

    Raises:
      UserError: for an option that neither has.
    """
    name, given = plugs.parse("--network", text)
    row, _ = expand("--network", name, GENERATOR_TEXTS)
    names = [{option.name for option in fields(table[row][0])} for table in (gan.GENERATORS, gan.DISCRIMINATORS)]
    every = names[0] | names[1]
    for option in given:
        if option not in every:
            raise UserError(f"--network: {name} has no option {option!r}; {plugs.suggest(option, every)}.")

    def only(those: set[str]) -> str:
        own = ", ".join(f"{option}={value!r}" for option, value in given.items() if option in those)
        return f"{name}({own})" if own else name

    return only(names[0]), only(names[1])
