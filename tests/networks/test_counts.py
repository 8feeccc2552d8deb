"""Parameters of the published networks, counted without allocating any."""

import jax
import pytest

from diffusion_jax import networks, tree
from diffusion_jax.networks.presets import PRESETS

PUBLISHED = {
    # facebookresearch/DiT: 256, 64 or 16 positions in a fixed table among them
    "dit-s/2": 32_963_360,
    "dit-s/4": 32_945_024,
    "dit-s/8": 33_148_160,
    "dit-b/2": 130_512_416,
    "dit-b/8": 130_881_536,
    "dit-l/2": 458_102_816,
    "dit-xl/2": 675_129_632,
    "dit-xl/8": 675_683_072,
    # hojonathanho/diffusion, "35.7 million" in the paper's appendix B
    "ddpm-cifar10": 35_746_307,
}


@pytest.mark.parametrize(("name", "count"), PUBLISHED.items())
def test_published_counts(name, count):
    preset = PRESETS[name]
    network = networks.build("network", name, preset.image, channels_out=preset.channels_out)
    assert tree.count(jax.eval_shape(network.init, jax.random.key(0))) + network.fixed == count
