"""Make images with a trained model.

The same --seed gives the same image for the same index, whatever --num_samples, --batch_size or the number of devices.
FILE.npz holds `images` uint8 [N,H,W,C], `label` int32 [N] for models with classes, and `about`, the JSON of what made
them; FILE.png is a grid.
"""

import io
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags

from diffusion_jax import files
from diffusion_jax.cli import arguments
from diffusion_jax.errors import UserError


def define(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """The command's flags."""
    flags.DEFINE_string("workdir", None, "the directory of a trained run", flag_values=values)
    flags.DEFINE_integer("num_samples", 100, "number of images", lower_bound=1, flag_values=values)
    flags.DEFINE_string("out", None, "the file to write, FILE.npz or FILE.png", flag_values=values)
    flags.DEFINE_integer("seed", 0, "of the noise", lower_bound=0, upper_bound=2**32 - 1, flag_values=values)
    flags.DEFINE_integer(
        "label", None, "the class of all images; all classes in turn where left out", flag_values=values
    )
    flags.DEFINE_string(
        "solver", None, "such as heun or 'ddim(eta=1)'; the config's where left out", flag_values=values
    )
    flags.DEFINE_integer("steps", None, "of the solver; the config's where left out", flag_values=values)
    flags.DEFINE_float("guidance", None, "guidance weight; the config's where left out", flag_values=values)
    flags.DEFINE_string("ema", None, "averaging profile, or none; the config's where left out", flag_values=values)
    flags.DEFINE_integer("step", None, "of the checkpoint; the newest where left out", flag_values=values)
    flags.DEFINE_integer(
        "batch_size", None, "images at once; the config's where left out", lower_bound=1, flag_values=values
    )


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    values = arguments.parse("sample", define, argv)
    workdir, out = arguments.required(values, "workdir"), Path(arguments.required(values, "out"))
    if out.suffix not in (".npz", ".png"):
        raise UserError(f"--out={out}: must end in .npz or .png.")
    if not out.absolute().parent.is_dir() or out.is_dir():
        raise UserError(f"--out={out}: must be a file in a directory that is there.")
    files.check_can_write("--out", out.absolute().parent)

    from diffusion_jax.cli import pictures, runtime
    from diffusion_jax.cli.workdir import load_weights, open_model
    from diffusion_jax.sampling import Sampler

    runtime.prepare()
    made_by = open_model(workdir)
    classes = made_by.spec.num_classes
    if values.label is not None and not 0 <= values.label < classes:
        known = f"must lie in [0, {classes})" if classes else "this model has no classes; leave the flag out"
        raise UserError(f"--label={values.label}: {known}.")
    changed = {name: values[name].value for name in ("solver", "steps", "guidance") if values[name].value is not None}
    options = made_by.family.sampling({**made_by.settings.sampling, **changed})
    profile = values.ema or made_by.settings.sample.ema
    sampler = made_by.sampler
    if values.batch_size:
        sampler = Sampler(made_by.family, made_by.spec, made_by.mesh, values.batch_size)
    weights, step = load_weights(made_by, workdir, profile, values.step)

    labels = sampler.labels(values.num_samples, values.label)
    images = sampler.draw(weights, values.seed, labels, values.num_samples, options)
    about = {
        "workdir": str(workdir),
        "step": step,
        "seed": values.seed,
        "ema": profile,
        "sample": {**made_by.settings.sampling, **changed},
        "config": made_by.config,
    }
    files.write_whole(out, encode(images, labels, about) if out.suffix == ".npz" else pictures.png(images))
    print(f"{len(images)} images of step {step} in {out}")


def encode(images: np.ndarray, labels: np.ndarray | None, about: dict) -> bytes:
    """The bytes of a samples file."""
    buffer = io.BytesIO()
    columns = {"images": images} | ({} if labels is None else {"label": labels})
    np.savez_compressed(buffer, **columns, about=np.array(json.dumps(about)))
    return buffer.getvalue()


def decode(file: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Images uint8 [N,H,W,C] and labels i32[N] (None where there are none) of a samples file.

    Raises:
      UserError: where the file is not one.
    """
    try:
        with file.open("rb") as handle, zipfile.ZipFile(handle), np.load(handle) as content:
            images = content["images"]
            labels = content.get("label", None)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"--samples={file} is no samples file, an .npz with `images` ({error}).") from error
    if images.dtype != np.uint8 or images.ndim != 4:
        raise UserError(f"--samples={file}: `images` is {images.dtype}{list(images.shape)}, not uint8 [N,H,W,C].")
    if labels is not None and labels.shape != images.shape[:1]:
        raise UserError(f"--samples={file}: `label` is {list(labels.shape)} for {len(images)} images.")
    return images, labels
