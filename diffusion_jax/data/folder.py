"""`folder:PATH`: PNG, JPEG and WebP files in a directory, one sub-directory a class, or no sub-directory at all.

Which images are held out:
- where PATH has sub-directories named `data.train_split` and `data.held_out_split` ("train" and "test" unless the
  config says otherwise), they are the two parts, and the classes are their sub-directories;
- else a file is held out if a hash of its name relative to PATH says so, one in `HELD_OUT` on average. It does not
  depend on the other files: images that are added later leave every other one where it is. (In a folder so small that
  this picks none, the file with the lowest hash is held out.)

Every file is decoded once when the data set is built: what is no image, or a broken one, is logged by name and skipped.
Hidden files are not looked at.
"""

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from diffusion_jax.data import images
from diffusion_jax.data.source import Dataset
from diffusion_jax.errors import UserError, require
from diffusion_jax.settings import DataSettings
from diffusion_jax.types import ImageSpec

READS = ("train_split", "held_out_split", "image_size")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
HELD_OUT = 10
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class File:
    """An image file.

    Attributes:
      path: where it is.
      name: relative to the directory that holds the classes, with forward slashes.
      size: (width, height) in pixels; (0, 0) before it was decoded.
      grey: whether it has no colour.
    """

    path: Path
    name: str
    size: tuple[int, int] = (0, 0)
    grey: bool = False

    @property
    def class_name(self) -> str:
        """The first directory of `name`; "" for a file beside the classes."""
        return self.name.partition("/")[0] if "/" in self.name else ""


@dataclass(frozen=True, kw_only=True)
class FolderSource:
    """Images decoded when they are asked for.

    Attributes:
      files: in the order of their names.
      classes: names of the classes, of which an image's label is the index; empty for data without labels.
      spec: of the images to give.
    """

    files: tuple[File, ...]
    classes: tuple[str, ...]
    spec: ImageSpec

    def __len__(self) -> int:
        """Number of images."""
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The image u8[H,W,C] (and label) of `index`."""
        file = self.files[index]
        image = images.square(decode(file.path), self.spec.size)
        out = {"image": images.pixels(image, self.spec.channels)}
        return out | {"label": self.classes.index(file.class_name)} if self.classes else out

    @property
    def identity(self) -> tuple:
        """What tells these files from others without a look inside: classes, and names, sizes and times of change."""
        stats = ((file.name, file.path.stat()) for file in self.files)
        return self.classes, tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


def decode(path: Path) -> Image.Image:
    """The image in `path`, upright (cameras note the rotation in EXIF), in mode "L" or "RGB"."""
    with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as image:
        image.load()
        return images.plain(ImageOps.exif_transpose(image))


def build(settings: DataSettings, argument: str) -> Dataset:
    """The images under the directory `argument`; grey if all of them are, else RGB.

    Raises:
      UserError: for a directory that is not there or holds no images, splits that it does not have, classes beside
        images without one, or images of different sizes without `data.image_size`.
    """
    root = Path(argument).expanduser()
    require(bool(argument) and root.is_dir(), "data.name", settings.name, "there is no such directory")
    train, held_out = split(settings, root)
    both = [*train, *held_out]
    classes = class_names(settings, both)
    spec = ImageSpec(
        size=settings.image_size or common_size(settings, both),
        channels=1 if all(file.grey for file in both) else 3,
        num_classes=len(classes),
    )
    return Dataset(
        name=settings.name,
        spec=spec,
        train=FolderSource(files=train, classes=classes, spec=spec),
        held_out=FolderSource(files=held_out, classes=classes, spec=spec),
    )


def split(settings: DataSettings, root: Path) -> tuple[tuple[File, ...], tuple[File, ...]]:
    """The files to train on and those that are held out; see the top of this file."""
    names = {"train_split": settings.train_split, "held_out_split": settings.held_out_split}
    missing = [field for field, name in names.items() if not name or not (root / name).is_dir()]
    changed = [field for field in missing if names[field] != getattr(DataSettings, field)]
    if not missing:
        train, held_out = (usable(list(walk(root / name))) for name in names.values())
    elif len(missing) == 1 or changed:
        field = (changed or missing)[0]
        raise UserError(
            f"data.{field} = {names[field]!r}: {root} has no such sub-directory; name two that it has in "
            f"data.train_split and data.held_out_split, or have neither, and 1 in {HELD_OUT} files is held out."
        )
    else:
        files = usable(list(walk(root)))
        lowest = min((fingerprint(file.name) for file in files), default=0)
        chosen = lambda file: fingerprint(file.name) % HELD_OUT == 0
        if not any(map(chosen, files)):  # a small folder
            chosen = lambda file: fingerprint(file.name) == lowest
        train = tuple(file for file in files if not chosen(file))
        held_out = tuple(file for file in files if chosen(file))
    if not train and not held_out:
        raise UserError(f"data.name = {settings.name!r}: holds no image that can be read (PNG, JPEG or WebP).")
    for part, kind in ((train, "to train on"), (held_out, "to hold out")):
        if not part:
            total = len(train) + len(held_out)
            raise UserError(f"data.name = {settings.name!r}: of its {total} images none is left {kind}.")
    return train, held_out


def fingerprint(name: str) -> int:
    """A number in [0, 2^64) from a file's name, relative and with forward slashes."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def walk(root: Path) -> Iterator[File]:
    """Every file under `root` that is not hidden, in a fixed order, links followed."""
    for folder, subfolders, names in os.walk(root, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                path = Path(folder, name)
                yield File(path=path, name=path.relative_to(root).as_posix())


def usable(files: Sequence[File]) -> tuple[File, ...]:
    """Those of `files` that decode, with what is known of them then; the others are logged."""

    def look(file: File) -> File | str:
        if file.path.suffix.lower() not in SUFFIXES:
            return "not a PNG, JPEG or WebP file"
        try:
            image = decode(file.path)
        except Exception as error:  # broken files make decoders raise anything
            return f"cannot be read ({type(error).__name__}: {error})"
        return replace(file, size=image.size, grey=image.mode == "L")

    with ThreadPoolExecutor() as pool:
        looked = list(pool.map(look, files))
    for file, answer in zip(files, looked, strict=True):
        if isinstance(answer, str):
            _log.warning("skipped %s: %s", file.path, answer)
    good = tuple(answer for answer in looked if isinstance(answer, File))
    if len(good) < len(files):
        _log.warning("%d of %d files skipped, %d images left", len(files) - len(good), len(files), len(good))
    return good


def class_names(settings: DataSettings, files: Sequence[File]) -> tuple[str, ...]:
    """Names of the classes in alphabetical order, or () for images without any."""
    names = sorted({file.class_name for file in files})
    if names == [""]:
        return ()
    if "" in names:
        stray = next(file.path.name for file in files if not file.class_name)
        raise UserError(
            f"data.name = {settings.name!r}: has images in sub-directories ({names[1]}) and beside them ({stray}); "
            "put every image into the sub-directory of its class, or all of them into one directory."
        )
    return tuple(names)


def common_size(settings: DataSettings, files: Sequence[File]) -> int:
    """The side of all images, which must be square and of one size."""
    sizes = sorted({file.size for file in files})
    if len(sizes) > 1 or sizes[0][0] != sizes[0][1]:
        seen = " and ".join(f"{width}x{height}" for width, height in sizes[:2])
        raise UserError(
            f"data.image_size = 0: {settings.name} has images of {seen} pixels, not square and of one size; "
            "give the size to resize and crop them to."
        )
    return sizes[0][0]
