"""`--what=flops` of a transformer over tokens; nothing is computed."""

from dataclasses import replace
from typing import Any

import jax

from diffusion_jax import plugs, tree
from diffusion_jax.cli.bench.instruments import gflops
from diffusion_jax.errors import UserError, require
from diffusion_jax.networks import flops as count
from diffusion_jax.networks import sequence
from diffusion_jax.networks.presets import SEQUENCES
from diffusion_jax.types import TokenSpec


def known(text: str) -> bool:
    """Whether `text` names a transformer over tokens: a preset or a row."""
    return plugs.parse("--network", text)[0] in {*SEQUENCES, *sequence.NETWORKS}


def flops(text: str, image_size: int | None, channels: int | None, num_classes: int | None) -> dict[str, Any]:
    """Parameters, and 1e-9 times the multiply-adds of one image's pass over all tokens, counted three ways.

    Raises:
      UserError: for unknown options, or sizes that do not fit.
    """
    tokens = tokens_of(text, image_size, channels, num_classes)
    network = sequence.build("--network", text, tokens)
    given = (jax.eval_shape(network.init, jax.random.key(0)), *network.example)
    return {
        "network": text,
        "tokens": tokens.length,
        "params": tree.count(given[0]),
    } | gflops(count.counts_of(network.apply, *given))


def tokens_of(text: str, image_size: int | None, channels: int | None, num_classes: int | None) -> TokenSpec:
    """The tokens of a preset, with another number of classes where one is given; pixels of 8 bits for a row.

    Raises:
      UserError: for a row without an image size, or another size of a preset's tokens.
    """
    preset = SEQUENCES.get(plugs.parse("--network", text)[0])
    if preset:
        for flag, value in (("--image_size", image_size), ("--channels", channels)):
            require(value is None, flag, value, f"{text} is for {preset.tokens.grid} tokens; leave it out")
        return preset.tokens if num_classes is None else replace(preset.tokens, num_classes=num_classes)
    if image_size is None:
        raise UserError(f"--network={text} is no preset with tokens of its own; give --image_size.")
    grid = (image_size, image_size, channels or 3)
    return TokenSpec(grid=grid, vocabulary=256, channels=0, num_classes=num_classes or 0)
