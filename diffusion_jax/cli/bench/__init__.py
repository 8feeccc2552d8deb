"""Measure on the devices that are here. Nothing is written but the trace that --profile asks for.

--what=run      compilation, training and sampling of a config: --config or --workdir
--what=flops    parameters and multiply-adds of any network, or of a GAN's two; nothing is computed: --network
--what=denoise  one forward pass of a network, as a sampler calls it: --network --batch
--what=train    one training step of the diffusion family with a network: --network --batch

Times are medians over repetitions, after compilation and one warm-up; the share of the peak compares them with a large
plain matrix product in the same process and precision.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from absl import flags

from diffusion_jax import files
from diffusion_jax.cli import arguments
from diffusion_jax.errors import UserError, require

DTYPES = ("float32", "bfloat16")
OF_A_NETWORK = ("network", "image_size", "channels", "num_classes")
READS = {
    "run": ("config", "workdir", "steps", "repetitions", "profile"),
    "flops": OF_A_NETWORK,
    "denoise": (*OF_A_NETWORK, "batch", "dtype", "repetitions", "profile"),
    "train": (*OF_A_NETWORK, "batch", "dtype", "repetitions", "profile"),
}
"""What is measured -> the flags that it reads, beside --json."""


def define(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """The command's flags."""
    arguments.define_config(values, argv)
    text = lambda name, default, help: flags.DEFINE_string(name, default, help, flag_values=values)
    number = lambda name, default, help, least: flags.DEFINE_integer(
        name, default, help, lower_bound=least, flag_values=values
    )
    text("what", "run", f"what is measured: {', '.join(READS)}")
    text("workdir", None, "time the config of this run instead of --config")
    text("network", None, "a network, such as dit-s/2, 'unet(channels=64)' or stylegan2-256")
    number("image_size", None, "side of its images in pixels; a preset has its own", 1)
    number("channels", None, "of its images; a preset has its own, others 3", 1)
    number("num_classes", None, "of its images; a preset has its own, others 0", 0)
    number("batch", 16, "images at once, over all devices", 1)
    text("dtype", "float32", f"of the network's arithmetic: {', '.join(DTYPES)}")
    number("steps", 20, "training steps a repetition of --what=run", 1)
    number("repetitions", 5, "of each measurement", 2)
    text("profile", None, "write a trace of the repetitions into this directory, for TensorBoard or Perfetto")
    flags.DEFINE_boolean("json", False, "print the result as one JSON object in the last line", flag_values=values)


def main(argv: Sequence[str]) -> None:
    """Run the command. The compilation cache stays off, so that compile times are those of a first run."""
    values = arguments.parse("bench", define, argv)
    check(values)
    result = measure(values)
    print(render(result), file=sys.stderr if values.json else sys.stdout)
    if values.json:
        print(json.dumps(result))


def check(values: flags.FlagValues) -> None:
    """Raise `UserError` for an unknown measurement, flags that it does not read, or an impossible value."""
    if values.what not in READS:
        raise UserError(f"--what={values.what}: must be one of {', '.join(READS)}.")
    unread = {name for names in READS.values() for name in names} - set(READS[values.what])
    for name in sorted(unread):
        if values[name].present:
            readers = " or ".join(f"--what={what}" for what, names in READS.items() if name in names)
            raise UserError(f"--{name}: --what={values.what} does not read it; {readers} does.")
    if values.dtype not in DTYPES:
        raise UserError(f"--dtype={values.dtype}: must be one of {', '.join(DTYPES)}.")
    if values.workdir and values.config:
        raise UserError("--workdir has a config of its own; leave out --config.")
    if values.what != "run":
        arguments.required(values, "network")
    if values.profile:
        files.check_can_write("--profile", Path(values.profile))


def measure(values: flags.FlagValues) -> dict[str, Any]:
    """What --what asks for, by name."""
    if values.what == "run":
        from diffusion_jax.cli.bench import config

        return config.measure(values)
    from diffusion_jax.cli.bench import network

    images = (values.image_size, values.channels, values.num_classes)
    for kind, what in others().items():
        if kind.known(values.network):
            rule = f"is {what}; --what={values.what} takes a denoising network"
            require(values.what == "flops", "--network", values.network, rule)
            return kind.flops(values.network, *images)
    subject = network.subject(values.network, *images)
    if values.what == "flops":
        return network.flops(subject)
    load = network.Load(batch=values.batch, dtype=values.dtype, repetitions=values.repetitions, profile=values.profile)
    return {"denoise": network.denoise, "train": network.train}[values.what](subject, load)


def others() -> dict[ModuleType, str]:
    """Modules with `known` and `flops` of networks that denoise nothing, and what such a network is."""
    from diffusion_jax.cli.bench import autoencoders, opponents, tokenizers, transformers

    return {
        transformers: "a network over tokens",
        tokenizers: "a tokenizer or its judge",
        opponents: "a generator and a discriminator",
        autoencoders: "a variational autoencoder",
    }


def render(result: dict[str, Any]) -> str:
    """The result as a table."""

    def text(value: Any) -> str:
        if isinstance(value, list):
            return " .. ".join(text(item) for item in value)
        return f"{value:,.4g}" if isinstance(value, float) else str(value)

    return "\n".join(f"{name:36s}{text(value)}" for name, value in result.items())
