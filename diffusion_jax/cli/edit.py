"""Edit images with a trained model, or go from one to another; nothing is trained for it.

    reconstruct  encode --images and decode them: each beside its reconstruction
    interpolate  --frames images between image 0 of two --seeds, or between the two --images; each image is encoded
                 under its own label, and what lies between has that of the nearer end
    translate    encode --images under --source_label (their own where left out), decode under --label
    img2img      noise --images to --strength, walk down from there: variations, under --label
    inpaint      keep what is black in --mask, make what is white: diffusion in steps that it walks --resamplings
                 times (RePaint), by default 20 of 'ddpm(variance=1.0)'; maskgit and mar as they make whole images

A family that cannot encode images has `interpolate` between seeds alone. `img2img` is diffusion's, over pixels, and
`inpaint` that and a transformer's that decodes by maskgit or mar.

--images is a samples file (.npz), whose labels are the images' own, or picture files (PNG, JPEG, WebP) separated by
commas, resized and cropped to the model's size. Where they are encoded a VAE shows the mean of the pixels unless --show
says otherwise. FILE.npz and FILE.png are as `sample` writes them; `reconstruct` puts the images themselves into the
.npz, too, as `original`, and into the .png, each before its reconstruction.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags

from diffusion_jax import files
from diffusion_jax.cli import arguments, drawing
from diffusion_jax.cli.sample import check_label
from diffusion_jax.errors import UserError, require

if TYPE_CHECKING:
    from diffusion_jax.sampling import Act
    from diffusion_jax.types import Family, ImageSpec

READS = {
    "reconstruct": {"images", "label"},
    "interpolate": {"images", "label", "seeds", "frames"},
    "translate": {"images", "label", "source_label"},
    "img2img": {"images", "label", "strength"},
    "inpaint": {"images", "label", "mask", "resamplings"},
}
"""edit -> the flags of its own that it reads."""

OWN = {
    "img2img": "diffusion over pixels has it",
    "inpaint": "diffusion over pixels has it, and a transformer that decodes by maskgit or mar",
}
"""Edits that a family has of its own, in `Family.edits`, and who has them; the others are walks in its latent."""

ENDS = ("first", "second")
"""What an interpolation calls its two seeds or images."""

DEFAULTS = {"inpaint": {"solver": "ddpm(variance=1.0)", "steps": 20, "grid": "uniform"}}
"""edit -> sampling options that suit a family with noise: RePaint's solver must draw the noise of the step back."""


def define(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """The command's flags."""
    drawing.define(values)
    string = lambda name, text: flags.DEFINE_string(name, None, text, flag_values=values)
    string("edit", f"what to do: {', '.join(READS)}")
    string("images", "the images to edit: FILE.npz, or picture files separated by commas")
    string("mask", "a picture, resized and cropped as --images are: white is made, black is kept")
    number = lambda name, text: flags.DEFINE_integer(name, None, text, lower_bound=0, flag_values=values)
    number("label", "the class to show; where left out the images' own, or as `sample` has it for image 0 the class 0")
    number("source_label", "the class that the images show; their own where left out")
    flags.DEFINE_float(
        "strength", None, "how far to noise, above 0 and at most 1; 0.5 where left out", flag_values=values
    )
    number("resamplings", "how often to walk each step, at least 1; 10 where left out")
    flags.DEFINE_list("seeds", None, "two seeds, such as 0,1", flag_values=values)
    number("frames", "number of images, both ends among them, at least 2; 10 where left out")


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    values = arguments.parse("edit", define, argv)
    arguments.required(values, "workdir")
    edit = check(values)
    out = drawing.check_out(values)
    drawer = prepare(values, edit)
    model = drawer.model
    rows = inputs(values, edit, model.spec, blind=model.family.tokenizer is not None)

    from diffusion_jax.sampling import Sampler

    count = max(len(row) for row in rows.values() if row.ndim)
    sampler = Sampler(action(values, edit, model.family), model.spec, model.mesh, drawer.batch_size)
    images = sampler.images(drawer.weights, values.seed, rows, count, drawer.options)
    about = drawer.about | {"edit": {"name": edit} | {flag: values[flag].value for flag in sorted(READS[edit])}}
    if edit == "reconstruct":
        write_beside(out, about, rows, images)
    else:
        drawing.write(out, about, count, images, label=rows.get("label"))
    print(f"{count} images in {out}")


def prepare(values: flags.FlagValues, edit: str) -> drawing.Drawer:
    """Open the run that the flags name, after checking that its family has the edit, and that the options allow it.

    Raises:
      UserError: for whatever is wrong with them.
    """
    from diffusion_jax.cli import runtime
    from diffusion_jax.cli.model import open_model

    runtime.prepare()
    # Before the options: a family without the edit need not have the options that suit it either.
    family = open_model(values.workdir).family
    action(values, edit, family)
    noisy = family.denoise is not None
    rule = f"the family {family.name} walks no step again; leave it out"
    require(values.resamplings is None or noisy, "--resamplings", values.resamplings, rule)
    if edit in OWN:
        return drawing.prepare(values, **(DEFAULTS.get(edit, {}) if noisy else {}))
    drawer = drawing.prepare(values, encodes=bool(values.images))
    check_walk(values, drawer)
    return drawer


def action(values: flags.FlagValues, edit: str, family: "Family") -> "Act":
    """What makes the images.

    Raises:
      UserError: naming the family, where it cannot, or cannot in this run.
    """
    from diffusion_jax import latents

    if edit in OWN:
        rule = f"the family {family.name} does not have it in this run; {OWN[edit]}"
        require(edit in family.edits, "--edit", edit, rule)
        return family.edits[edit]
    name = edit if edit != "interpolate" else "interpolate_images" if values.images else "interpolate_seeds"
    return partial(latents.WALKS[name], latents.latent_of(family, "--edit", edit, encodes=bool(values.images)))


def check(values: flags.FlagValues) -> str:
    """The name of the edit, after checking that its flags are there and in range, and no other edit's are.

    Raises:
      UserError: naming the flag.
    """
    edit = arguments.required(values, "edit")
    require(edit in READS, "--edit", edit, f"must be one of {', '.join(READS)}")
    own = set().union(*READS.values())
    for name in sorted(own - READS[edit]):
        require(values[name].value is None, f"--{name}", values[name].value, f"{edit} does not read this flag")
    if edit == "interpolate":
        rule = "needs two seeds, such as --seeds=0,1, or two --images, and not both"
        require(bool(values.images) == (values.seeds is None), "--edit", edit, rule)
    else:
        arguments.required(values, "images")
    if edit == "inpaint":
        arguments.required(values, "mask")
    if values.seeds is not None:
        fine = len(values.seeds) == 2 and all(seed.isdecimal() and int(seed) < 2**32 for seed in values.seeds)
        require(fine, "--seeds", ",".join(values.seeds), "must be two whole numbers from 0 to 2^32 - 1")
    fine = values.strength is None or 0.0 < values.strength <= 1.0
    require(fine, "--strength", values.strength, "must be above 0 and at most 1")
    for name, low, high in (("resamplings", 1, 10_000), ("frames", 2, 10_000)):
        value = values[name].value
        require(value is None or low <= value <= high, f"--{name}", value, f"must lie in [{low}, {high}]")
    return edit


def inputs(values: flags.FlagValues, edit: str, spec: "ImageSpec", blind: bool) -> dict[str, np.ndarray]:
    """What the edit is made from, by the names under which it reads it.

    A family that is `blind`, such as a tokenizer, looks at no labels: none are asked for.
    """
    for flag in ("label", "source_label"):
        check_label(flag, values[flag].value, spec.num_classes)
    if values.seeds:
        ends = dict(zip(ENDS, map(np.uint32, values.seeds), strict=True))
        return ends | {"share": shares(values)} | labels("label", values.label or 0, None, len(shares(values)), spec)
    image, own = images(values.images, spec)
    if blind and own is None and values.label is None:
        spec = replace(spec, num_classes=0)
    if edit == "interpolate":
        return between(values, image, own, spec)
    count = len(image)
    rows = labels("label", values.label, own, count, spec)
    if edit == "reconstruct":
        return rows | {"image": image}
    if edit == "img2img":
        return rows | {"image": image, "strength": np.float32(values.strength or 0.5)}
    if edit == "inpaint":
        known = np.broadcast_to(mask(values.mask, spec), (count, spec.size, spec.size, 1))
        return rows | {"image": image, "known": known, "resamplings": np.int32(values.resamplings or 10)}
    return rows | {"image": image} | labels("source_label", values.source_label, own, count, spec)


def shares(values: flags.FlagValues) -> np.ndarray:
    """f32[frames], how far along the way from the first end to the second each frame lies."""
    return np.linspace(0.0, 1.0, values.frames or 10, dtype=np.float32)


def between(
    values: flags.FlagValues, image: np.ndarray, own: np.ndarray | None, spec: "ImageSpec"
) -> dict[str, np.ndarray]:
    """What `latents.interpolate_images` reads, of the images f32[2,H,W,C] and their labels i32[2], if they have any."""
    require(len(image) == 2, "--images", values.images, f"must be two images to interpolate between, not {len(image)}")
    share = shares(values)
    rows = {"share": share, "seed": np.uint32(values.seed)}
    rows |= {name: np.repeat(end[None], len(share), axis=0) for name, end in zip(ENDS, image, strict=True)}
    of_ends = labels("label", values.label, own, 2, spec)
    if of_ends:
        first, second = (np.full(len(share), label) for label in of_ends["label"])
        rows |= {"first_label": first, "second_label": second, "label": np.where(share < 0.5, first, second)}
    return rows


def labels(
    name: str,
    asked: int | None,
    own: np.ndarray | None,
    count: int,
    spec: "ImageSpec",
) -> dict[str, np.ndarray]:
    """`name` i32[count]: what was asked for, else the images' own; nothing for a model without classes."""
    if not spec.num_classes:
        return {}
    if asked is None and own is None:
        raise UserError(
            f"--{name} is missing: this model has {spec.num_classes} classes, and the images have no labels."
        )
    return {name: np.full(count, asked, np.int32) if asked is not None else own.astype(np.int32)}


def images(text: str, spec: "ImageSpec") -> tuple[np.ndarray, np.ndarray | None]:
    """f32[n,H,W,C] in [-1, 1] and labels i32[n], None where there are none, of what --images names."""
    from diffusion_jax.data.source import to_float

    if text.endswith(".npz"):
        found, own = drawing.read("images", Path(text))
        rule = f"holds images of {list(found.shape[1:])}, and the model's are {list(spec.shape)}"
        require(found.shape[1:] == spec.shape, "--images", text, rule)
        require(len(found) > 0, "--images", text, "holds no images")
        fits = own is None or bool(np.all((own >= 0) & (own < max(spec.num_classes, 1))))
        require(fits, "--images", text, f"holds labels outside [0, {spec.num_classes})")
        return to_float(found), own
    return to_float(np.stack([picture("images", name, spec, spec.channels) for name in text.split(",")])), None


def mask(file: str, spec: "ImageSpec") -> np.ndarray:
    """Which pixels are known, bool[1,H,W,1]: those that are black."""
    made = picture("mask", file, spec, 1) >= 128
    require(
        bool(made.any()) and not made.all(), "--mask", file, "must have black pixels to keep and white ones to make"
    )
    return ~made[None]


def picture(flag: str, file: str, spec: "ImageSpec", channels: int) -> np.ndarray:
    """A picture file as u8[H,W,channels] of the model's size."""
    from diffusion_jax.data import images as formats

    try:
        with Path(file).open("rb") as handle:
            return formats.pixels(formats.square(formats.decode(handle), spec.size), channels)
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"--{flag}={file}: is no picture that can be read ({error}).") from error


def write_beside(
    out: Path, about: dict[str, Any], rows: dict[str, np.ndarray], reconstructions: Iterator[np.ndarray]
) -> None:
    """Write reconstructions and the images that they are of; in a grid each image stands before its own."""
    from diffusion_jax.cli import pictures
    from diffusion_jax.data.source import to_uint8

    original = to_uint8(rows["image"])
    if out.suffix == ".png":
        made = np.concatenate(list(reconstructions))
        files.write_whole(out, pictures.png(pictures.alternating(original, made)))
    else:
        drawing.write(out, about, len(original), reconstructions, label=rows.get("label"), original=original)


def check_walk(values: flags.FlagValues, drawer: drawing.Drawer) -> None:
    """Check that the sampling options leave a way between a latent and its image; with --images, the way back, too.

    Raises:
      UserError: where the solver draws noise; where --images are to be encoded and a rule of guidance leaves no ODE,
        or there is a temperature of noise that nothing draws.
    """
    encodes, said = bool(values.images), drawer.about["sample"]
    rule = "means nothing where images are encoded, and none is drawn"
    require(values.temperature is None or not encodes, "--temperature", values.temperature, rule)
    if drawer.model.family.denoise is None:  # no noise, and nothing to solve
        return

    from diffusion_jax.diffusion.guidance import CFGPlusPlus
    from diffusion_jax.diffusion.solvers import draws_noise

    rule = "draws noise, and an image cannot be encoded by it; take --solver=heun, ddim, dpmpp_2m or another of an ODE"
    require(not draws_noise(drawer.options.solver), "sample.solver", said["solver"], rule)
    for field in ("rules", "autoguidance_rules"):
        fine = not (encodes and any(isinstance(rule, CFGPlusPlus) for rule in getattr(drawer.options, field)))
        rule = "cfg_pp has no ODE behind it, and an image cannot be encoded by it; leave it out"
        require(fine, f"sample.{field}", said.get(field), rule)
