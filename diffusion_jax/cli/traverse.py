"""Show what single dimensions of a model's latent do: one row a dimension, whose value goes from -range to range.

All else of the latent stays as it is: as that of image 0 of --seed, which `sample` makes, or of --images, each in turn,
of which a VAE shows the mean of the pixels unless --show says otherwise.

FILE.png is a grid with --columns columns. FILE.npz holds the same images, row by row, as `images` uint8 [N,H,W,C], with
`dimension` int32 [N] and `value` float32 [N], `label` int32 [N] for models with classes, and `about`, the JSON of what
made them. Dimensions count through the latent as C order flattens it; the first ten where the flags do not say which.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from absl import flags

from diffusion_jax import files
from diffusion_jax.cli import arguments, drawing
from diffusion_jax.cli.edit import check_walk, images, labels
from diffusion_jax.cli.sample import check_label
from diffusion_jax.errors import require

if TYPE_CHECKING:
    from diffusion_jax.types import ImageSpec

FIRST = 10
"""So many dimensions are shown where the flags do not say which: the first ones."""


def define(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """The command's flags."""
    drawing.define(values)
    string = lambda name, text: flags.DEFINE_string(name, None, text, flag_values=values)
    string("images", "begin at these and not at --seed: FILE.npz, or picture files separated by commas")
    number = lambda name, text: flags.DEFINE_integer(name, None, text, lower_bound=0, flag_values=values)
    number("label", "the class to show; where left out the images' own, or as `sample` has it for image 0 the class 0")
    flags.DEFINE_list("dimensions", None, "which dimensions, such as 0,1,2", flag_values=values)
    number("num_dimensions", f"the first so many dimensions; {FIRST} where neither this nor --dimensions is given")
    flags.DEFINE_float("range", 3.0, "the largest value, where N(0, 1) is the usual one", flag_values=values)
    flags.DEFINE_integer(
        "columns", 7, "number of values; with an odd one 0 stands in the middle", lower_bound=2, flag_values=values
    )


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    values = arguments.parse("traverse", define, argv)
    arguments.required(values, "workdir")
    check(values)
    out = drawing.check_out(values)
    drawer = drawing.prepare(values, encodes=bool(values.images))
    model = drawer.model

    from diffusion_jax import latents
    from diffusion_jax.cli import pictures
    from diffusion_jax.sampling import Sampler

    field = "images" if values.images else "workdir"
    latent = latents.latent_of(model.family, f"--{field}", values[field].value, encodes=bool(values.images))
    if values.images:
        check_walk(values, drawer)
    chosen = dimensions(values, math.prod(latent.shape))
    rows = inputs(values, chosen, model.spec, blind=model.family.tokenizer is not None)

    count = len(rows["value"])
    sampler = Sampler(partial(latents.traverse, latent), model.spec, model.mesh, drawer.batch_size)
    made = sampler.images(drawer.weights, values.seed, rows, count, drawer.options)
    if out.suffix == ".png":
        files.write_whole(out, pictures.png(np.concatenate(list(made)), columns=values.columns))
    else:
        asked = {flag: values[flag].value for flag in ("images", "label", "range", "columns")}
        about = drawer.about | {"traverse": asked | {"dimensions": chosen}}
        columns = {name: rows.get(name) for name in ("label", "dimension", "value")}
        drawing.write(out, about, count, made, **columns)
    print(f"{count} images, a row for each of {len(chosen)} dimensions, in {out}")


def check(values: flags.FlagValues) -> None:
    """Check the flags that can be checked without the model.

    Raises:
      UserError: naming the flag.
    """
    require(0.0 < values.range < math.inf, "--range", values.range, "must be positive")
    asked = values.dimensions
    if asked is not None:
        fine = bool(asked) and all(text.isdecimal() for text in asked)
        require(fine, "--dimensions", ",".join(asked), "must be whole numbers from 0 on, such as 0,1,2")
        rule = "leave it out, or --dimensions, which says which"
        require(values.num_dimensions is None, "--num_dimensions", values.num_dimensions, rule)


def dimensions(values: flags.FlagValues, width: int) -> list[int]:
    """The dimensions that are asked for, of a latent of `width` numbers.

    Raises:
      UserError: where the latent does not have them.
    """
    if values.dimensions is None:
        asked = values.num_dimensions
        fine = asked is None or 1 <= asked <= width
        require(fine, "--num_dimensions", asked, f"must lie in [1, {width}], the width of this model's latent")
        return list(range(asked or min(FIRST, width)))
    chosen = [int(text) for text in values.dimensions]
    rule = f"must lie in [0, {width}), for the latent of this model has {width} dimensions"
    require(max(chosen) < width, "--dimensions", ",".join(values.dimensions), rule)
    return chosen


def inputs(values: flags.FlagValues, chosen: Sequence[int], spec: "ImageSpec", blind: bool) -> dict[str, np.ndarray]:
    """What `latents.traverse` reads: for each image to begin at, dimension and value, in this order, one row.

    A family that is `blind`, such as a tokenizer, looks at no labels: none are asked for.
    """
    check_label("label", values.label, spec.num_classes)
    if values.images:
        image, own = images(values.images, spec)
        count, begun = len(image), {"image": image}
    else:
        count, own, begun = 1, None if blind else np.zeros(1, np.int32), {}
    if not (blind and own is None and values.label is None):
        begun |= labels("label", values.label, own, count, spec)
    at = np.linspace(-values.range, values.range, values.columns, dtype=np.float32)
    grid = np.meshgrid(np.arange(count, dtype=np.int32), np.asarray(chosen, np.int32), at, indexing="ij")
    index, dimension, value = (axis.ravel() for axis in grid)
    of_images = {name: row[index] for name, row in begun.items()}
    return of_images | {"index": index, "dimension": dimension, "value": value, "seed": np.uint32(values.seed)}
