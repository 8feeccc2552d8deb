"""`diffusion-jax bench --what=flops` of a generator and a discriminator."""

import json

import pytest

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


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--what=denoise", "--network=r3gan-ffhq64"], ["r3gan-ffhq64", "--what=denoise", "denoising network"]),
        (["--what=flops", "--network=dcgan"], ["--network=dcgan", "--image_size"]),
        (["--what=flops", "--network=stylegan2-257"], ["stylegan2-257", "did you mean 'stylegan2-256'"]),
        (["--what=flops", "--network=r3gan-ffhq64", "--image_size=20"], ["r3gan-ffhq64", "power of two"]),
    ],
)
def test_refused(capsys, flags, words):
    assert main(["bench", *flags]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert all(word in line for word in words), line
