"""What `sample`, `edit` and `traverse` share: flags for weights and sampling options, and the files they write."""

import ast
import json
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from absl import flags

from diffusion_jax import files
from diffusion_jax.cli import arguments
from diffusion_jax.errors import UserError, require

if TYPE_CHECKING:
    from diffusion_jax.cli.model import Model
    from diffusion_jax.types import Tree, Weights

CHANGES = (
    "solver",
    "grid",
    "steps",
    "guidance",
    "rules",
    "autoguidance",
    "autoguidance_rules",
    "classifier",
    "threshold",
    "temperature",
    "truncation",
    "show",
    "top_k",
    "top_p",
    "choice_temperature",
    "guidance_schedule",
    "solver_steps",
)
"""Flags that change the field of that name in the config's `sample` section."""

TABLES = {
    "solver": ("diffusion/solvers/__init__.py", "SOLVERS"),
    "grid": ("diffusion/grids.py", "GRIDS"),
    "rules": ("diffusion/guidance/__init__.py", "GUIDANCE_RULES"),
    "threshold": ("diffusion/thresholding.py", "THRESHOLDS"),
    "truncation": ("families/gan.py", "TRUNCATIONS"),
    "show": ("families/vae.py", "SHOWN"),
}
"""Flag -> (the file of `diffusion_jax` that writes its table down, a dictionary or a tuple; the table)."""


def rows(flag: str) -> str:
    """The names in a flag's table, for --help: read and not imported, for that would wait for jax."""
    file, table = TABLES[flag]
    code = ast.parse((Path(__file__).parents[1] / file).read_bytes())
    assigned = (node for node in code.body if isinstance(node, ast.Assign))
    (value,) = (node.value for node in assigned if ast.unparse(node.targets[0]) == table)
    names = value.keys if isinstance(value, ast.Dict) else value.elts
    return ", ".join(sorted(name.value for name in names))


def define(values: flags.FlagValues) -> None:
    """The flags."""
    string = lambda name, text: flags.DEFINE_string(name, None, text, flag_values=values)
    string("workdir", "the directory of a trained run")
    string("out", "the file to write, FILE.npz or FILE.png")
    flags.DEFINE_integer("seed", 0, "of the noise", lower_bound=0, upper_bound=2**32 - 1, flag_values=values)
    string("solver", f"such as heun or 'ddim(eta=1.0)'; the config's where left out. Rows: {rows('solver')}")
    string("grid", f"such as uniform or 'custom(times=(1.0,0.5))'; the config's where left out. Rows: {rows('grid')}")
    text = (
        "of the solver, or of decoding for maskgit and mar; those of a custom --grid, or the config's, where left out"
    )
    flags.DEFINE_integer("steps", None, text, flag_values=values)
    flags.DEFINE_float("guidance", None, "guidance weight; the config's where left out", flag_values=values)
    string("rules", f"of guidance, such as 'interval+rescaled'; the config's where left out. Rows: {rows('rules')}")
    flags.DEFINE_float("autoguidance", None, "weight against the model of --weak_workdir", flag_values=values)
    string("autoguidance_rules", "of autoguidance, as --rules")
    flags.DEFINE_float("classifier", None, "weight of the classifier's gradient", flag_values=values)
    string("threshold", f"such as 'dynamic(quantile=0.99)'; the config's where left out. Rows: {rows('threshold')}")
    flags.DEFINE_float(
        "temperature", None, "of noise, latents or tokens; the config's where left out", flag_values=values
    )
    text = (
        f"of a GAN's z or style, such as 'normal(bound=1.0)'; the config's where left out. Rows: {rows('truncation')}"
    )
    string("truncation", text)
    text = "of a VAE, what is shown of the pixels' distribution; where left out the config's, and of --images the mean"
    string("show", f"{text}. Rows: {rows('show')}")
    text = "of a transformer, how many of the likeliest tokens to draw from; 0 for all"
    flags.DEFINE_integer("top_k", None, text, flag_values=values)
    text = "of a transformer, how much of the probability to draw from, in (0, 1]"
    flags.DEFINE_float("top_p", None, text, flag_values=values)
    text = "of maskgit, how much chance there is in which tokens are kept first"
    flags.DEFINE_float("choice_temperature", None, text, flag_values=values)
    text = "of var and mar, linear for a weight that grows from scale to scale, or as places are filled; or constant"
    string("guidance_schedule", text)
    flags.DEFINE_integer("solver_steps", None, "of mar's solver, in each of its --steps", flag_values=values)
    string("ema", "averaging profile, none, or 'posthoc(std=0.1)'; the config's where left out")
    flags.DEFINE_integer("step", None, "of the checkpoint; the newest where left out", flag_values=values)
    string("weak_workdir", "the run of a worse model, for --autoguidance; its config's averaging profile")
    flags.DEFINE_integer(
        "weak_step", None, "of the worse model's checkpoint; the newest where left out", flag_values=values
    )
    flags.DEFINE_integer(
        "batch_size", None, "images at once; the config's where left out", lower_bound=1, flag_values=values
    )


def check_out(values: flags.FlagValues) -> Path:
    """The file that --out names.

    Raises:
      UserError: where it cannot be written.
    """
    out = Path(arguments.required(values, "out"))
    require(out.suffix in (".npz", ".png"), "--out", str(out), "must end in .npz or .png")
    fine = out.absolute().parent.is_dir() and not out.is_dir()
    require(fine, "--out", str(out), "must be a file in a directory that is there")
    files.check_can_write("--out", out.absolute().parent)
    return out


@dataclass(frozen=True, kw_only=True)
class Drawer:
    """A model that is ready to draw.

    Attributes:
      about: plain JSON: what the images are made with.
    """

    model: "Model"
    weights: "Weights"
    options: "Tree"
    batch_size: int
    about: dict[str, Any]


def prepare(values: flags.FlagValues, *, encodes: bool = False, **defaults: Any) -> Drawer:
    """Open the run that the flags name, check its sampling options, load its weights.

    `defaults`, and where the command `encodes` images `of_encoded`, stand in the place of the config's `sample` fields
    where no flag does.

    Raises:
      UserError: for whatever is wrong with them.
    """
    from diffusion_jax.cli import runtime
    from diffusion_jax.cli.model import load_weights, open_model

    runtime.prepare()
    model = open_model(values.workdir)
    rule = "give --weak_workdir too"
    require(values.weak_step is None or bool(values.weak_workdir), "--weak_step", values.weak_step, rule)
    for name in ("autoguidance", "autoguidance_rules"):
        require(values[name].value is None or bool(values.weak_workdir), f"--{name}", values[name].value, rule)
    weak = weaken(values, model) if values.weak_workdir else None
    if weak:
        model = replace(model, family=weak[0])
    changed = {name: values[name].value for name in CHANGES if values[name].value is not None}
    suited = of_encoded(model.config) if encodes else {}
    brought = steps_of(values.grid) if model.family.denoise else {}
    section = {**model.settings.sampling, **suited, **defaults, **brought, **changed}
    options = model.family.sampling(section)
    rule = "is not asked where sample.autoguidance is 1; give --autoguidance=2 or another weight"
    require(not weak or section.get("autoguidance", 1.0) != 1.0, "--weak_workdir", values.weak_workdir, rule)
    profile = values.ema or model.settings.sample.ema
    weights, step = load_weights(model, values.workdir, profile, values.step)
    about = {"workdir": str(values.workdir), "step": step, "seed": values.seed, "ema": profile, "sample": section}
    if weak:
        weights |= {"weak": weak[1]}
        about["weak"] = {"workdir": str(values.weak_workdir), "step": weak[2]}
    return Drawer(
        model=model,
        weights=weights,
        options=options,
        batch_size=values.batch_size or model.settings.sample.batch_size,
        about=about | {"config": model.config},
    )


def of_encoded(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `sample` that suit images which were encoded, of those that a config's family has.

    What is shown of them is the mean of a distribution of pixels, not a draw around it.
    """
    from diffusion_jax.cli.workdir import completed

    return {"show": "mean"} if "show" in completed(config)["sample"] else {}


def steps_of(grid: str | None) -> dict[str, int]:
    """The number of steps that a grid from the command line brings along, such as `custom`, as a field of `sample`."""
    from diffusion_jax import plugs
    from diffusion_jax.diffusion.grids import GRIDS

    steps = plugs.build("sample.grid", grid, GRIDS).steps if grid else None
    return {} if steps is None else {"steps": steps}


def weaken(values: flags.FlagValues, model: "Model") -> tuple[Any, "Weights", int]:
    """(the family under autoguidance, the worse model's weights, their step)."""
    from diffusion_jax import plugs
    from diffusion_jax.cli.model import load_weights, open_model
    from diffusion_jax.cli.workdir import completed, tokenizer_record
    from diffusion_jax.diffusion.schedule import SCHEDULES, Learned

    weak = open_model(values.weak_workdir, "weak_workdir")
    require(
        model.family.guided_by is not None, "--weak_workdir", values.weak_workdir, "this family has no autoguidance"
    )
    schedule = lambda text: plugs.build("family.schedule", text, SCHEDULES | {"learned": Learned})
    for field, of in (("name", str), ("schedule", schedule)):
        ours, theirs = (completed(each.config)["family"][field] for each in (model, weak))
        rule = f"its family.{field} is {theirs!r}; autoguidance needs the model's own, {ours!r}"
        require(of(ours) == of(theirs), "--weak_workdir", values.weak_workdir, rule)
    rule = "its schedule is learned, and so another than the model's"
    require(not isinstance(schedule(theirs), Learned), "--weak_workdir", values.weak_workdir, rule)
    same = (weak.spec.shape, weak.spec.num_classes) == (model.spec.shape, model.spec.num_classes)
    require(same, "--weak_workdir", values.weak_workdir, "its images are of another size, or its classes others")
    weights, step = load_weights(weak, values.weak_workdir, weak.settings.sample.ema, values.weak_step, "weak_")
    ours, theirs = tokenizer_record(Path(values.workdir)), tokenizer_record(Path(values.weak_workdir))
    alike = all((ours or {}).get(name) == (theirs or {}).get(name) for name in ("hash", "shift", "scale"))
    require(alike, "--weak_workdir", values.weak_workdir, "its tokenizer, or its latents' scale, is another")
    return model.family.guided_by(weak.family.denoise), weights, step


# ---------------------------------------------------------------------------------------------- files


Column = np.ndarray | Iterator[np.ndarray]
"""An array, or its rows a batch at a time."""


def write(out: Path, about: dict[str, Any], count: int, images: Iterator[np.ndarray], **others: Column | None) -> None:
    """Write a samples file, or for a .png a grid of its images: whole or not at all.

    A batch goes to the .npz as it arrives, while the device makes the next one; memory does not grow with `count`.

    Args:
      out: the file.
      about: plain JSON: what the images are made with.
      count: number of rows of every column.
      images: uint8 [n,H,W,C] a batch.
      others: columns beside them, by name; those that are None are left out.
    """
    from diffusion_jax.cli import pictures

    if out.suffix == ".png":
        files.write_whole(out, pictures.png(np.concatenate(list(images))))
        return
    columns = {"images": images} | others | {"about": np.array(json.dumps(about))}
    with files.whole(out) as stream, zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, column in columns.items():
            if column is not None:
                # A member's length is not known before its end, and 50,000 images of 256x256 are more than 4 GiB.
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    write_column(member, column, count)


def write_column(member: IO[bytes], column: Column, count: int) -> None:
    """Write a column in numpy's .npy format: the shape stands in the header, before `count` rows have been made."""
    if isinstance(column, np.ndarray):
        np.lib.format.write_array(member, column, allow_pickle=False)
        return
    for i, batch in enumerate(column):
        if i == 0:
            header = {"descr": np.lib.format.dtype_to_descr(batch.dtype), "fortran_order": False}
            np.lib.format.write_array_header_1_0(member, header | {"shape": (count, *batch.shape[1:])})
        member.write(batch.tobytes())


def read(flag: str, file: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Images uint8 [N,H,W,C] and labels i32[N] (None where there are none) of the samples file that a flag names.

    Raises:
      UserError: where the file is not one.
    """
    try:
        with file.open("rb") as handle, zipfile.ZipFile(handle), np.load(handle) as content:
            images = content["images"]
            labels = content.get("label", None)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"--{flag}={file} is no samples file, an .npz with `images` ({error}).") from error
    if images.dtype != np.uint8 or images.ndim != 4:
        raise UserError(f"--{flag}={file}: `images` is {images.dtype}{list(images.shape)}, not uint8 [N,H,W,C].")
    if labels is not None and labels.shape != images.shape[:1]:
        raise UserError(f"--{flag}={file}: `label` is {list(labels.shape)} for {len(images)} images.")
    return images, labels
