"""Data sets by name.

To add one: a module with `build(settings, argument) -> Dataset` and `READS`, the fields of `DataSettings` that it looks
at, and a line in `KINDS`.
"""

import importlib

from jax.sharding import NamedSharding

from diffusion_jax import plugs
from diffusion_jax.data.feed import Feed, resident
from diffusion_jax.data.source import Dataset, Source, example_bytes, unlabelled
from diffusion_jax.errors import UserError, require
from diffusion_jax.settings import DataSettings

KINDS = {
    "digits": "diffusion_jax.data.digits",
    "digits_canvas": "diffusion_jax.data.digits_canvas",
    "stacked_digits": "diffusion_jax.data.stacked_digits",
    "tfds": "diffusion_jax.data.tfds",
    "folder": "diffusion_jax.data.folder",
}
"""What stands before the colon in `data.name` -> the module that builds it, imported when it is asked for."""


def build(settings: DataSettings) -> Dataset:
    """The data set that `settings.name` names: "digits_canvas", "tfds:NAME", "folder:PATH" or another row of `KINDS`.

    Its labels are left out where `settings.labels` says so.

    Raises:
      UserError: for an unknown kind, for a held-out split that is the training split, and whatever the kind refuses.
    """
    kind, _, argument = settings.name.partition(":")
    if kind not in KINDS:
        raise UserError(f"data.name = {settings.name!r}: there is no {kind!r}; {plugs.suggest(kind, KINDS)}.")
    require(
        settings.held_out_split != settings.train_split,
        "data.held_out_split",
        settings.held_out_split,
        "must differ from data.train_split: evaluation needs images that training never saw",
    )
    module = importlib.import_module(KINDS[kind])
    for field in ("train_split", "held_out_split", "data_dir", "image_size"):
        value, default = getattr(settings, field), getattr(DataSettings, field)
        require(value == default or field in module.READS, f"data.{field}", value, f"{kind} does not read this field")
    dataset = module.build(settings, argument)
    return dataset if settings.labels else unlabelled(dataset)


def build_feed(
    source: Source, *, batch_size: int, seed: int, rows: NamedSharding, steps_per_chunk: int, device_megabytes: int
) -> Feed:
    """The feed of `source`: on the devices where it fits into `device_megabytes`, else streamed through grain.

    Either gives the same batch for the same (seed, step).

    Args:
      source: what to train on.
      batch_size: examples a step, over all devices.
      seed: of the order.
      rows: sharding of a batch's first axis.
      steps_per_chunk: the most steps that one dispatch makes.
      device_megabytes: the most that training images may take on a device, whole sets and streamed chunks alike.
    """
    common = {"batch_size": batch_size, "seed": seed, "rows": rows}
    if len(source) * example_bytes(source) <= device_megabytes * 2**20:
        return resident(source, **common, capacity=steps_per_chunk)
    from diffusion_jax.data.stream import stream  # grain takes two seconds to import

    return stream(source, **common, most=steps_per_chunk, megabytes=device_megabytes)
