"""Every published network: parameters and multiply-adds of one forward pass of one image, from shapes alone.

    python experiments/networks.py

prints the tables of docs/networks.md. `diffusion-jax bench --what=flops --network=NAME` gives a row, and that of a
single network counted again in the compiled program.
"""

import jax

from diffusion_jax import networks, tree
from diffusion_jax.cli.bench import tokenizers
from diffusion_jax.networks import flops, gan, sequence
from diffusion_jax.networks.presets import (
    FIRST_STAGES,
    PAIRS,
    PRESETS,
    SEQUENCES,
    FirstStage,
    Pair,
    Preset,
    Transformer,
)

SOURCES = {
    "kl": "Rombach et al. 2022",
    "kl-f8-16": "Esser et al. 2024",
    "llamagen": "Sun et al. 2024",
    "mar": "Li et al. 2024",
    "maskgit": "Chang et al. 2022",
    "var": "Tian et al. 2024",
    "vqgan": "Esser et al. 2021",
}
"""Preset, or what stands before its first dash -> the paper that it is of."""


def line(*cells: object) -> str:
    """A line of a table."""
    return "| " + " | ".join(map(str, cells)) + " |"


def source(name: str) -> str:
    """The paper of a preset."""
    return SOURCES.get(name) or SOURCES[name.partition("-")[0]]


def row(name: str, preset: Preset) -> str:
    """Of a denoising network."""
    image = preset.image
    network = networks.build("network", name, image, channels_out=preset.channels_out)
    trained = tree.count(jax.eval_shape(network.init, jax.random.key(0)))
    return line(
        f"`{name}`",
        f"{image.size}x{image.size}x{image.channels}",
        image.num_classes or "",
        f"{trained + network.fixed:,}",
        f"{network.fixed:,}" if network.fixed else "",
        f"{flops.multiply_adds(network, image) / 1e9:.2f}",
    )


def row_of_pair(name: str, pair: Pair) -> str:
    """Of a generator and its discriminator."""
    image = pair.image
    generator, discriminator = gan.build_generator("g", name, image), gan.build_discriminator("d", name, image)
    cells = [f"`{name}`", f"{image.size}x{image.size}x{image.channels}", image.num_classes or ""]
    shapes = flops.shapes_of_pair(generator, discriminator, image)
    for apply, given in zip((generator.apply, discriminator.apply), shapes, strict=True):
        cells += [f"{tree.count(given[0]):,}", f"{flops.multiply_adds_of(apply, *given) / 1e9:.2f}"]
    return line(*cells)


def row_of_tokenizer(name: str, stage: FirstStage) -> str:
    """Of an autoencoder and its bottleneck, the codebook among the parameters."""
    found = tokenizers.flops(name, None, None, None)
    return line(
        f"`{name}`",
        f"{stage.image.size}x{stage.image.size}x{stage.image.channels}",
        "x".join(map(str, (*found["grid"], found["latents"]))),
        f"{found['vocabulary']:,}" if found["vocabulary"] else "",
        f"{found['params']:,}",
        f"{found['encoder_gflops']:.2f}",
        f"{found['decoder_gflops']:.2f}",
        source(name),
    )


def row_of_transformer(name: str, preset: Transformer) -> str:
    """Of a network over tokens or latents: one pass over all of them."""
    tokens = preset.tokens
    network = sequence.build("network", name, tokens)
    params = jax.eval_shape(network.init, jax.random.key(0))
    return line(
        f"`{name}`",
        tokens.length,
        f"{tokens.vocabulary:,} codes" if tokens.vocabulary else f"{tokens.channels} numbers",
        tokens.num_classes,
        f"{tree.count(params):,}",
        f"{flops.multiply_adds_of(network.apply, params, *network.example) / 1e9:.2f}",
        source(name),
    )


TABLES = (
    (PRESETS, row, "preset, images, classes, parameters, of them fixed, GFLOPs"),
    (PAIRS, row_of_pair, "preset, images, classes, generator, GFLOPs, discriminator, GFLOPs"),
    (
        FIRST_STAGES,
        row_of_tokenizer,
        "preset, images, grid, codes, parameters, encoder's GFLOPs, decoder's GFLOPs, source",
    ),
    (SEQUENCES, row_of_transformer, "preset, tokens, each one of, classes, parameters, GFLOPs, source"),
)

if __name__ == "__main__":
    for presets, of, columns in TABLES:
        head = columns.split(", ")
        print(line(*head), "|---" * len(head) + "|", sep="\n")
        for name, preset in presets.items():
            print(of(name, preset), flush=True)
        print()
