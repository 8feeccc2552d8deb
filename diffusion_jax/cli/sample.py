"""Make images with a trained model.

The same --seed gives the same image for the same index, whatever --num_samples, --batch_size or the number of devices.
FILE.npz holds `images` uint8 [N,H,W,C], `label` int32 [N] for models with classes, and `about`, the JSON of what made
them; FILE.png is a grid. With --trajectory the .npz also holds `trajectory` float32 [N,steps + 1,H,W,C], x at every
stop of the solver, and the .png has a row of them for each image.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from absl import flags

from diffusion_jax import files
from diffusion_jax.cli import arguments, drawing
from diffusion_jax.errors import UserError


def define(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """The command's flags."""
    drawing.define(values)
    flags.DEFINE_integer("num_samples", 100, "number of images", lower_bound=1, flag_values=values)
    flags.DEFINE_integer(
        "label", None, "the class of all images; all classes in turn where left out", flag_values=values
    )
    flags.DEFINE_boolean("trajectory", False, "keep x at every stop of the solver", flag_values=values)


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    values = arguments.parse("sample", define, argv)
    arguments.required(values, "workdir")
    out, count = drawing.check_out(values), values.num_samples
    drawer = drawing.prepare(values)
    model = drawer.model
    check_label("label", values.label, model.spec.num_classes)

    from diffusion_jax.cli import pictures
    from diffusion_jax.data.source import to_uint8
    from diffusion_jax.sampling import Sampler

    sampler = Sampler(model.family.generate, model.spec, model.mesh, drawer.batch_size)
    rows = sampler.labels(count, values.label)
    images = sampler.images(drawer.weights, values.seed, rows, count, drawer.options)
    stops = follow(drawer, rows, values.seed, count) if values.trajectory else None
    if stops is not None and out.suffix == ".png":
        shown = to_uint8(np.concatenate(list(stops)))
        files.write_whole(out, pictures.png(shown.reshape(-1, *model.spec.shape), columns=shown.shape[1]))
    else:
        drawing.write(out, drawer.about, count, images, label=rows.get("label"), trajectory=stops)
    print(f"{count} images of step {drawer.about['step']} in {out}")


def follow(drawer: drawing.Drawer, rows: dict[str, np.ndarray], seed: int, count: int) -> Iterator[np.ndarray]:
    """x at every stop of the solver, f32[n,steps + 1,H,W,C] a batch."""
    from diffusion_jax.sampling import Sampler

    model = drawer.model
    if model.family.trajectory is None:
        raise UserError(f"--trajectory: the family {model.family.name} does not walk from noise to an image.")
    steps = drawer.about["sample"]["steps"]
    act = lambda *args: model.family.trajectory(*args, steps)
    sampler = Sampler(act, model.spec, model.mesh, drawer.batch_size)
    return sampler.batches(drawer.weights, seed, rows, count, drawer.options)


def check_label(flag: str, label: int | None, classes: int) -> None:
    """Raise `UserError` unless the model has the class that a flag asks for."""
    if label is not None and not 0 <= label < classes:
        known = f"must lie in [0, {classes})" if classes else "this model has no classes; leave the flag out"
        raise UserError(f"--{flag}={label}: {known}.")
