"""`--what=flops`, `denoise` and `train`: a network by itself, on random numbers."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from diffusion_jax import data, families, networks, plugs, tree
from diffusion_jax.cli.bench.instruments import device, durations, gflops, memory, peak_flops, timed
from diffusion_jax.data.source import ArraySource
from diffusion_jax.errors import UserError, require
from diffusion_jax.networks import flops as count
from diffusion_jax.networks.presets import PAIRS, PRESETS
from diffusion_jax.settings import MeshSettings, TrainSettings
from diffusion_jax.training import loop, sharding
from diffusion_jax.training.step import Trainer
from diffusion_jax.types import ImageSpec


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The network that is measured: a row of `networks.BACKBONES` or a preset, and its images."""

    text: str
    image: ImageSpec
    channels_out: int

    def build(self, dtype: str = "float32") -> networks.Network:
        """The network, computing in `dtype`.

        Raises:
          UserError: for an unknown name or option, or sizes that do not fit.
        """
        return networks.build("--network", self.text, self.image, dtype, self.channels_out)


@dataclass(frozen=True, kw_only=True)
class Load:
    """What it is measured under: images at once, arithmetic, repetitions, where a trace of these goes, if anywhere."""

    batch: int
    dtype: str
    repetitions: int
    profile: str | None


def subject(text: str, image_size: int | None, channels: int | None, num_classes: int | None) -> Subject:
    """The network `text` for the images of its preset, where it is one, but for the numbers that are given.

    Raises:
      UserError: for a network that is no preset and without an image size.
    """
    name, _ = plugs.parse("--network", text)
    known = {**networks.BACKBONES, **PRESETS}
    require(name in known, "--network", text, f"there is no {name!r}; {plugs.suggest(name, {**known, **PAIRS})}")
    preset = PRESETS.get(name)
    image = images(text, preset and preset.image, image_size, channels, num_classes)
    doubled = preset.channels_out // preset.image.channels if preset else 1
    return Subject(text=text, image=image, channels_out=doubled * image.channels)


def images(
    text: str, published: ImageSpec | None, image_size: int | None, channels: int | None, num_classes: int | None
) -> ImageSpec:
    """The images that the network `text` was published for, if it was, but for the numbers that are given.

    Raises:
      UserError: for a network that was not, and without an image size.
    """
    if published is None and image_size is None:
        raise UserError(f"--network={text} is no preset with images of its own; give --image_size.")
    given = {"size": image_size, "channels": channels, "num_classes": num_classes}
    given = {name: value for name, value in given.items() if value is not None}
    return replace(published or ImageSpec(size=0, channels=3, num_classes=0), **given)


# ---------------------------------------------------------------------------------------------- without computing


def flops(subject: Subject) -> dict[str, Any]:
    """Parameters, and 1e-9 times the multiply-adds of one image's forward pass, counted three ways; see `count`."""
    network = subject.build()
    return sizes(subject, network) | gflops(count.counts(network, subject.image))


def sizes(subject: Subject, network: networks.Network) -> dict[str, Any]:
    """What shapes tell: parameters as papers count them, those that are trained, and multiply-adds."""
    trained = tree.count(jax.eval_shape(network.init, jax.random.key(0)))
    return {
        "network": subject.text,
        "params": trained + network.fixed,
        "trained_params": trained,
        "gflops": count.multiply_adds(network, subject.image) / 1e9,
    }


# ---------------------------------------------------------------------------------------------- denoise and train


def denoise(subject: Subject, load: Load) -> dict[str, Any]:
    """One forward pass of images at one time, each under its own label, by weights that are prepared for a loop."""
    mesh = sharding.make_mesh(MeshSettings())
    sharding.check_batch(mesh, "--batch", load.batch)
    network, image = subject.build(load.dtype), subject.image
    everywhere, rows = NamedSharding(mesh, P()), NamedSharding(mesh, sharding.BATCH)
    ready = lambda key: network.prepare(network.init(key))
    params = jax.jit(ready, out_shardings=everywhere)(jax.random.key(0))
    x = tree.place(np.random.default_rng(0).normal(size=(load.batch, *image.shape)).astype(np.float32), rows)
    time = tree.place(np.full((1,), 0.5, np.float32), everywhere)
    label = tree.place(np.arange(load.batch, dtype=np.int32) % image.num_classes, rows) if image.num_classes else None

    given = (params, x, time, label)
    compile_s, program = timed(lambda: jax.jit(network.apply).lower(*given).compile())
    act = lambda: jax.block_until_ready(program(*given))
    about = sizes(subject, subject.build())
    return about | timing(act, program, compile_s, 2e9 * about["gflops"], load)


def train(subject: Subject, load: Load) -> dict[str, Any]:
    """One training step of the diffusion family by the repository's own loop: loss, gradient, AdamW, average."""
    mesh = sharding.make_mesh(MeshSettings())
    sharding.check_batch(mesh, "--batch", load.batch)
    section = {"name": "diffusion", "network": subject.text}
    if subject.channels_out == 2 * subject.image.channels:
        section |= {"objective": "learned_variance", "time_sampling": "uniform"}
    about = sizes(subject, subject.build())
    trainer = Trainer(families.build(section, subject.image, load.dtype), TrainSettings(batch_size=load.batch), seed=0)
    feed = random_feed(subject.image, load.batch, NamedSharding(mesh, sharding.BATCH))
    program = loop.compile_program(trainer, feed, mesh, MeshSettings())
    chunk, one = feed.chunk(0, 1), tree.place(np.array(1, np.int32), program.abstract.step.sharding)
    compile_s, advance = timed(lambda: program.advance.lower(program.abstract, chunk, one, {}).compile())
    state = program.init()

    def act() -> None:
        nonlocal state
        state, _ = jax.block_until_ready(advance(state, chunk, one, {}))

    # The gradient takes two products for each of the forward pass: one towards its input, one towards its weights.
    return about | timing(act, advance, compile_s, 6e9 * about["gflops"], load)


def random_feed(image: ImageSpec, batch: int, rows: NamedSharding) -> data.Feed:
    """Batches of noise."""
    rng = np.random.default_rng(0)
    source = ArraySource(
        image=rng.uniform(-1.0, 1.0, (batch, *image.shape)).astype(np.float32),
        label=rng.integers(image.num_classes, size=batch, dtype=np.int32) if image.num_classes else None,
    )
    return data.build_feed(source, batch_size=batch, seed=0, rows=rows, steps_per_chunk=1, device_megabytes=1024)


def timing(
    act: Callable[[], None], program: jax.stages.Compiled, compile_s: float, flops: float, load: Load
) -> dict[str, Any]:
    """Time, speed and memory of `act`, which runs `program` once and takes `flops` operations an image."""
    seconds = durations(act, load.repetitions, load.profile)
    used = memory(program)  # before the large product, whose arrays would count
    step_s, peak = float(np.median(seconds)), peak_flops(load.dtype)
    achieved = flops * load.batch / step_s
    return {
        "batch_size": load.batch,
        "dtype": load.dtype,
        "compile_s": compile_s,
        "step_s": step_s,
        "step_s_range": [min(seconds), max(seconds)],
        "images_per_s": load.batch / step_s,
        "flops_per_s": achieved,
        "peak_flops_per_s": peak,
        "share_of_peak": achieved / peak,
        **used,
        **device(),
    }
