"""Every published network: parameters and multiply-adds of one forward pass of one image, from shapes alone.

    python experiments/networks.py

prints the tables of docs/networks.md. `diffusion-jax bench --what=flops --network=NAME` gives a row, and counts it
again in the compiled program.
"""

import jax

from diffusion_jax import networks, tree
from diffusion_jax.networks import flops, gan
from diffusion_jax.networks.presets import PAIRS, PRESETS, Pair, Preset


def row(name: str, preset: Preset) -> str:
    """A line of the table."""
    image = preset.image
    network = networks.build("network", name, image, channels_out=preset.channels_out)
    trained = tree.count(jax.eval_shape(network.init, jax.random.key(0)))
    cells = (
        f"`{name}`",
        f"{image.size}x{image.size}x{image.channels}",
        image.num_classes or "",
        f"{trained + network.fixed:,}",
        f"{network.fixed:,}" if network.fixed else "",
        f"{flops.multiply_adds(network, image) / 1e9:.2f}",
    )
    return "| " + " | ".join(map(str, cells)) + " |"


def row_of_pair(name: str, pair: Pair) -> str:
    """A line of the second table."""
    image = pair.image
    generator, discriminator = gan.build_generator("g", name, image), gan.build_discriminator("d", name, image)
    cells = [f"`{name}`", f"{image.size}x{image.size}x{image.channels}", image.num_classes or ""]
    shapes = flops.shapes_of_pair(generator, discriminator, image)
    for apply, given in zip((generator.apply, discriminator.apply), shapes, strict=True):
        cells += [f"{tree.count(given[0]):,}", f"{flops.multiply_adds_of(apply, *given) / 1e9:.2f}"]
    return "| " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    print("| preset | images | classes | parameters | of them fixed | GFLOPs |\n|---|---|---|---|---|---|")
    for name, preset in PRESETS.items():
        print(row(name, preset), flush=True)
    print("\n| preset | images | classes | generator | GFLOPs | discriminator | GFLOPs |\n" + "|---" * 7 + "|")
    for name, pair in PAIRS.items():
        print(row_of_pair(name, pair))
