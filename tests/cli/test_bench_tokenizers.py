"""`diffusion-jax bench --what=flops` of a tokenizer and of its judge."""

import json

import pytest

from diffusion_jax.cli.main import main


def bench(capsys, network, *flags):
    assert main(["bench", "--what=flops", f"--network={network}", *flags, "--json"]) == 0
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_a_tokenizer_is_counted_with_its_codebook(capsys):
    """By hand, at 2x2 pixels without a resolution more: convolutions see 2x2 pixels, zeros around them included."""
    result = bench(capsys, "maskgit-vqgan(channels=4,multipliers=(1,),blocks=1)", "--image_size=2")
    norm, block = 8, 2 * 9 * 4 * 4 + 2 * 8
    encoder = 9 * 3 * 4 + 2 * block + norm + (4 * 256 + 256)
    decoder = (9 * 256 * 4 + 4) + 2 * block + norm + (9 * 4 * 3 + 3)
    assert result["params"] == encoder + decoder + 1024 * 256
    assert (result["grid"], result["vocabulary"], result["latents"]) == ([2, 2], 1024, 256)
    products = 4 * (9 * 3 * 4 + 4 * 9 * 4 * 4 + 4 * 256), 4 * (9 * 256 * 4 + 4 * 9 * 4 * 4 + 9 * 4 * 3)
    for name, expected in zip(("encoder_gflops", "decoder_gflops"), products, strict=True):
        assert 1e9 * result[name] == pytest.approx(expected, rel=0.1)  # and what the norms multiply
        assert 1e9 * result[name] >= expected


def test_a_judge_is_counted(capsys):
    result = bench(capsys, "patchgan(channels=4,halvings=1)", "--image_size=8")
    assert result["params"] == (16 * 3 * 4 + 4) + 16 * 4 * 8 + 2 * 8 + (16 * 8 + 1)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--what=train", "--network=kl-f8"], ["kl-f8", "--what=train", "denoising network"]),
        (["--what=flops", "--network=kl-f8(chanels=3)"], ["--network", "did you mean 'channels'"]),
        (["--what=flops", "--network=kl-f8", "--image_size=20"], ["kl-f8", "20 pixels cannot be"]),
    ],
)
def test_refused(capsys, flags, words):
    assert main(["bench", *flags]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert all(word in line for word in words), line
