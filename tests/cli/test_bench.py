"""`diffusion-jax bench` of a network: published counts, figures that agree with one another, a readable trace."""

import gzip
import json
import os
import subprocess
import sys

import pytest

from diffusion_jax.cli import xla
from diffusion_jax.cli.main import main

TINY = ["--network=dit(patch=4,width=32,depth=1,heads=2)", "--image_size=8", "--num_classes=10"]


def bench(capsys, *flags):
    assert main(["bench", *flags, "--json"]) == 0
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


@pytest.mark.parametrize(
    ("network", "params", "trained", "gflops"),
    # Peebles & Xie 2022, Table 4; their counts include the table of positions, which is not trained.
    [("dit-s/2", 32_963_360, 32_963_360 - 256 * 384, 6.06), ("dit-xl/2", 675_129_632, 674_834_720, 118.64)],
)
def test_flops_are_the_papers(capsys, network, params, trained, gflops):
    result = bench(capsys, "--what=flops", f"--network={network}")
    assert result["network"] == network
    assert (result["params"], result["trained_params"]) == (params, trained)
    assert result["gflops"] == pytest.approx(gflops, rel=5e-3)
    assert result["gflops_compiled"] == pytest.approx(gflops, rel=5e-3)


def test_a_preset_for_other_images(capsys):
    """Four times the patches: the products with weights take four times as long, attention sixteen times."""
    small, large = (bench(capsys, "--what=flops", "--network=dit-s/8", f"--image_size={size}") for size in (32, 64))
    tokens = 16
    attention = 12 * 2 * tokens**2 * 384 / 1e9
    condition = (256 * 384 + 384**2 + 12 * 6 * 384**2 + 2 * 384**2) / 1e9  # once an image
    weights = small["gflops"] - attention - condition
    assert large["gflops"] == pytest.approx(4 * weights + 16 * attention + condition, rel=1e-3)
    assert large["trained_params"] == small["trained_params"]


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("what", "passes", "copies"), [("denoise", 1, 1), pytest.param("train", 3, 4, marks=pytest.mark.slow)]
)
def test_times_of_a_network_agree_with_its_shapes(capsys, what, passes, copies, dtype):
    """Training takes three passes, and keeps weights, two moments and an average, in float32."""
    result = bench(capsys, f"--what={what}", *TINY, "--batch=16", f"--dtype={dtype}", "--repetitions=3")
    shapes = bench(capsys, "--what=flops", *TINY)
    assert {name: result[name] for name in ("params", "gflops")} == {
        name: shapes[name] for name in ("params", "gflops")
    }
    assert (result["batch_size"], result["dtype"]) == (16, dtype)
    low, high = result["step_s_range"]
    assert 0 < low <= result["step_s"] <= high
    assert result["images_per_s"] == pytest.approx(16 / result["step_s"])
    assert result["flops_per_s"] * result["step_s"] == pytest.approx(passes * 2e9 * result["gflops"] * 16)
    assert result["share_of_peak"] == pytest.approx(result["flops_per_s"] / result["peak_flops_per_s"])
    assert result["program_bytes"] > 4 * copies * result["trained_params"]
    assert result["process_peak_bytes"] > result["program_bytes"]
    assert result["compile_s"] > 0


@pytest.mark.slow
def test_a_learned_variance_is_trained_as_such(capsys):
    result = bench(
        capsys, "--what=train", "--network=dit-s/8(width=32,depth=1,heads=2)", "--batch=8", "--repetitions=2"
    )
    assert result["step_s"] > 0


def test_a_profile_shows_operations_of_the_program(capsys, tmp_path):
    bench(capsys, "--what=denoise", *TINY, "--batch=8", "--repetitions=2", f"--profile={tmp_path / 'trace'}")
    (file,) = (tmp_path / "trace").glob("plugins/profile/*/*.trace.json.gz")  # what Perfetto opens
    assert list(file.parent.glob("*.xplane.pb"))  # what TensorBoard opens
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    modules = {event.get("args", {}).get("hlo_module") for event in events}
    assert "jit_dit" in modules or "jit_apply" in modules
    assert any(event["name"].startswith("dot") for event in events if event["ph"] == "X")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--what=flop"], ["--what=flop", "flops"]),
        (["--what=flops"], ["--network is missing"]),
        (["--what=flops", "--network=dit-s/3"], ["--network = 'dit-s/3'", "did you mean 'dit-s/"]),
        (["--what=flops", "--network=dit"], ["--network=dit", "--image_size"]),
        (["--what=flops", "--network=dit-s/2", "--image_size=33"], ["patch = 2", "33"]),
        (["--what=flops", "--network=dit-s/2", "--batch=8"], ["--batch", "--what=denoise"]),
        (["--what=flops", "--network=dit-s/2(deep=2)"], ["no option 'deep'"]),
        (["--what=denoise", "--network=dit-s/2", "--batch=0"], ["--batch=0"]),
        (["--what=denoise", "--network=dit-s/2", "--batch=12"], ["--batch = 12", "8 devices"]),
        (["--what=train", "--network=dit-s/2", "--dtype=float16"], ["--dtype=float16", "bfloat16"]),
        (["--what=train", "--network=dit-s/2", "--workdir=x"], ["--workdir", "--what=run"]),
        (["--what=train", "--network=dit-s/2", "--config=configs/digits.py:diffusion"], ["--config", "--what=run"]),
        (["--network=dit-s/2"], ["--network", "--what=flops"]),
        (["--what=denoise", "--network=dit-s/2", "--profile=README.md"], ["--profile", "README.md is a file"]),
    ],
)
def test_bench_refuses(capsys, flags, words):
    assert main(["bench", *flags]) == 2
    captured = capsys.readouterr()
    assert not captured.out
    (line,) = captured.err.strip().splitlines()
    assert all(word in line for word in words), line


def test_the_compilers_flags_are_added_and_never_override(monkeypatch):
    environment = {"XLA_FLAGS": "--xla_dump_to=/x"}
    xla.set_cpu_flags(environment)
    assert environment["XLA_FLAGS"] == "--xla_dump_to=/x --xla_cpu_experimental_ynn_fusion_type="
    for chosen in ("--xla_cpu_experimental_ynn_fusion_type=all", environment["XLA_FLAGS"]):
        environment = {"XLA_FLAGS": chosen}
        xla.set_cpu_flags(environment)
        assert environment == {"XLA_FLAGS": chosen}
    monkeypatch.setattr(xla, "version", lambda name: "0.13.1")
    environment = {}
    xla.set_cpu_flags(environment)
    assert environment == {}


def test_this_jaxlib_knows_the_compilers_flags():
    """A jaxlib that does not know a flag ends the process with its first program."""
    environment = os.environ | {"XLA_FLAGS": ""}
    command = [sys.executable, "-m", "diffusion_jax", "bench", "--what=flops", *TINY]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "gflops_compiled" in ended.stdout
