"""`diffusion-jax bench --what=flops` of a generator and a discriminator."""

import json

import pytest

from diffusion_jax import plugs
from diffusion_jax.cli.bench import opponents
from diffusion_jax.cli.main import main


def test_both_networks_are_counted(capsys):
    """Of published width at 8 pixels: four blocks, a basis of 16 numbers a channel, no change of width."""
    network = "r3gan(channels_max=32,channels_base=256)"
    assert main(["bench", "--what=flops", f"--network={network}", "--image_size=8", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    block = 2 * 32 * 64 + 9 * 16 * 64  # two matrices, and 3x3 convolutions of 16 channels to 16
    image, basis = 3 * 32, 16 * 32
    assert result["network"] == network
    assert result["generator_params"] == 4 * (block + 2 * 64) + image + basis + 64 * 32
    assert result["discriminator_params"] == 4 * (block + 2 * 64) + image + basis + 32
    products = 2 * (16 + 64) * block + 64 * image + 64 * 32  # two blocks on 16 pixels, two on 64
    assert 1e9 * result["generator_gflops"] == pytest.approx(products + basis)  # each number of the basis is scaled
    assert result["generator_gflops_compiled"] == pytest.approx(result["generator_gflops"], rel=0.01)
    assert result["discriminator_gflops_compiled"] == pytest.approx(result["discriminator_gflops"], rel=0.01)
    assert result["discriminator_gflops_cost_analysis"] > 0.0
    for key in ("params", "gflops"):
        assert result[key] == pytest.approx(result[f"generator_{key}"] + result[f"discriminator_{key}"])


def test_each_side_is_given_the_options_that_it_has():
    """Of these `latent` and `style` are the generator's, `group` the discriminator's, and both have `channels_max`."""
    generator, discriminator = opponents.sides("stylegan2(latent=8,group=2,channels_max=4,style=6)")
    assert plugs.parse("x", generator) == ("stylegan2", {"latent": 8, "channels_max": 4, "style": 6})
    assert plugs.parse("x", discriminator) == ("stylegan2", {"group": 2, "channels_max": 4})
    assert opponents.sides("stylegan2-256(group=8)") == ("stylegan2-256", "stylegan2-256(group=8)")


def test_an_option_of_one_side_alone_is_fine(capsys):
    network = "resnet(width=4,multipliers=(1,),latent=4,blocks=0)"
    assert main(["bench", "--what=flops", f"--network={network}", "--image_size=8"]) == 0
    assert network in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--what=denoise", "--network=r3gan-ffhq64"], ["r3gan-ffhq64", "--what=denoise", "denoising network"]),
        (["--what=flops", "--network=dcgan"], ["--network=dcgan", "--image_size"]),
        (["--what=flops", "--network=resnet(latnet=4)", "--image_size=8"], ["resnet", "'latnet'", "'latent'"]),
        (["--what=flops", "--network=stylegan2-257"], ["stylegan2-257", "did you mean 'stylegan2-256'"]),
        (["--what=flops", "--network=r3gan-ffhq64", "--image_size=20"], ["r3gan-ffhq64", "power of two"]),
    ],
)
def test_refused(capsys, flags, words):
    assert main(["bench", *flags]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert all(word in line for word in words), line
