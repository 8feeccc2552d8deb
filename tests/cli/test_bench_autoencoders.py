"""`diffusion-jax bench --what=flops` of a variational autoencoder."""

import json

import pytest

from diffusion_jax.cli.main import main

pytestmark = pytest.mark.usefixtures("quick_compilation")


def bench(capsys, network, *flags):
    assert main(["bench", "--what=flops", f"--network={network}", *flags, "--json"]) == 0
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_encoder_and_decoder_are_counted(capsys):
    """By hand, at 2x2 grey pixels and one resolution: five mixed logistics are 15 numbers a pixel."""
    network = "flat(latents=3,channels=4,multipliers=(1,))"
    result = bench(capsys, network, "--image_size=2", "--channels=1")
    norm, block = 8, 2 * (9 * 4 * 4 + 4) + 2 * 8
    encoder = (9 * 4 + 4) + block + (16 * 6 + 6)
    decoder = 16 + (3 * 16 + 16) + block + norm + (9 * 4 * 15 + 15)
    assert (result["network"], result["latents"]) == (network, 3)
    assert result["params"] == encoder + decoder
    up = 4 * (9 * 4 + 2 * 9 * 4 * 4) + 16 * 6
    down = 3 * 16 + 4 * (2 * 9 * 4 * 4 + 9 * 4 * 15)
    for name, expected in (("gflops", up + down), ("decoder_gflops", down)):
        assert expected <= 1e9 * result[name] < 1.1 * expected  # and what the norms multiply


def test_a_ladder_is_counted(capsys):
    result = bench(capsys, "ladder(channels=4,multipliers=(1,1),levels=(1,1),latents=2)", "--image_size=8")
    assert result["latents"] == 2 * (64 + 16)
    assert 0.0 < result["decoder_gflops"] < result["gflops"]
    assert result["gflops_compiled"] == pytest.approx(result["gflops"], rel=0.1)
    assert result["gflops_cost_analysis"] > 0.0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--what=denoise", "--network=ladder"], ["ladder", "--what=denoise", "denoising network"]),
        (["--what=flops", "--network=flat"], ["--network=flat", "--image_size"]),
        (["--what=flops", "--network=flat(latent=3)", "--image_size=8"], ["flat", "did you mean 'latents'"]),
        (["--what=flops", "--network=ladder", "--image_size=6"], ["ladder", "6 pixels cannot be"]),
    ],
)
def test_refused(capsys, flags, words):
    assert main(["bench", *flags]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert all(word in line for word in words), line
