"""`tfds:NAME`: every TensorFlow Datasets set with an `image` and, where it has classes, a `label`; without TensorFlow.

Data prepared as ArrayRecord is read in place. Data that is there as TFRecord only has no random access: with the extra
`[tensorflow]` it is read through tf.data once, resized, into memory. Nothing is ever downloaded.
"""

import difflib
import importlib.util
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core import constants, read_only_builder

from diffusion_jax.data import images
from diffusion_jax.data.source import ArraySource, Dataset, Source, to_arrays
from diffusion_jax.errors import UserError, require
from diffusion_jax.settings import DataSettings
from diffusion_jax.types import ImageSpec

READS = ("train_split", "held_out_split", "data_dir", "image_size")


@dataclass(frozen=True, kw_only=True)
class RecordSource:
    """Images decoded when they are asked for.

    Attributes:
      records: serialized examples by index.
      features: `image` and, with classes, `label`: what is parsed of a record; the rest is passed over.
      spec: of the images to give.
      identity: what tells the records from others without a look inside, for `data.encoded`.
    """

    records: Any
    features: tfds.features.FeaturesDict
    spec: ImageSpec
    identity: tuple = ()

    def __len__(self) -> int:
        """Number of images."""
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The image u8[H,W,C] (and label) of `index`."""
        record = self.records[index]
        if isinstance(record, bytes):  # tfds.testing.mock_data gives examples instead of records
            record = self.features.deserialize_example_np(record, decoders={"image": tfds.decode.SkipDecoding()})
        return example(record, self.spec)


def example(record: dict[str, Any], spec: ImageSpec) -> dict[str, Any]:
    """{"image": u8[H,W,C]} and, with classes, "label", from a parsed record with an encoded image.

    Raises:
      UserError: for an example without label (TFDS writes -1) in a set with classes.
    """
    raw = record["image"]
    if isinstance(raw, np.ndarray):
        image = Image.fromarray(raw[..., 0] if raw.shape[-1] == 1 else raw)
    else:
        image = images.decode(io.BytesIO(raw))
    out = {"image": images.pixels(images.square(image, spec.size), spec.channels)}
    if not spec.num_classes:
        return out
    label = int(record["label"])
    rule = "the split holds examples without a label; choose a labelled one, or leave labels out with data.labels=False"
    require(label >= 0, "label", label, rule)
    return out | {"label": label}


def build(settings: DataSettings, argument: str) -> Dataset:
    """The TFDS data set `argument`, "NAME", "NAME/CONFIG" or "NAME:VERSION"; images u8[H,W,C].

    Raises:
      UserError: for an unknown name or split, a set that is not prepared in `data.data_dir`, one that cannot be read
        without TensorFlow, one without 8-bit images, or images of different sizes without `data.image_size`.
    """
    require(bool(argument), "data.name", settings.name, "write 'tfds:' and the name of a data set")
    builder = find(settings, argument)
    spec = look(settings, builder.info.features)
    names = ("image", "label") if spec.num_classes else ("image",)
    features = tfds.features.FeaturesDict({name: builder.info.features[name] for name in names})
    splits = {"train_split": settings.train_split, "held_out_split": settings.held_out_split}
    train, held_out = (read(settings, builder, field, split, features, spec) for field, split in splits.items())
    refuse_overlap(settings, builder)
    for field, source in (("train_split", train), ("held_out_split", held_out)):
        require(len(source) > 0, f"data.{field}", splits[field], "holds no example")
        try:
            source[0]  # sets without labels in some split have none from the first example on
        except UserError as error:
            raise UserError(f"data.{field} = {splits[field]!r}: {error}") from None
    return Dataset(name=settings.name, spec=spec, train=train, held_out=held_out)


def find(settings: DataSettings, name: str) -> tfds.core.DatasetBuilder:
    """The builder of `name`: from the prepared files where they are there (needs no code), else from TFDS's code."""
    data_dir = settings.data_dir or None
    try:
        return read_only_builder.builder_from_files(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError:
        pass  # not prepared, or by a TFDS older than 4.0
    except ValueError as error:
        raise UserError(f"data.name = {settings.name!r}: {first_line(error)}.") from None
    try:
        return tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError:
        near = difflib.get_close_matches(name, tfds.list_builders(with_community_datasets=False), n=1)
        hint = f"; did you mean 'tfds:{near[0]}'?" if near else ", neither as code nor as files in data.data_dir."
        raise UserError(f"data.name = {settings.name!r}: TFDS knows no such data set{hint}") from None
    except ModuleNotFoundError:
        raise not_prepared(settings, name) from None  # some sets' code needs TensorFlow; their files would not
    except (ValueError, AssertionError) as error:  # an unknown config, version, or a malformed name
        raise UserError(f"data.name = {settings.name!r}: {first_line(error)}.") from None


def first_line(error: Exception) -> str:
    """What TFDS has to say, without its preamble, its lists and its full stop."""
    text = str(error).strip().split("\n")[0].rpartition('}": ')[2]
    return text.split(". Here are")[0].rstrip(" .:")


def not_prepared(settings: DataSettings, name: str) -> UserError:
    """The sentence that says how to prepare the set."""
    where = settings.data_dir or constants.DATA_DIR
    return UserError(
        f"data.name = {settings.name!r}: not prepared in data.data_dir = {where!r}; "
        f"prepare it with `tfds build {name} --file_format=array_record --data_dir={where}`."
    )


def look(settings: DataSettings, features: Any) -> ImageSpec:
    """What the images will look like, from the set's features."""
    columns = dict(features.items()) if isinstance(features, tfds.features.FeaturesDict) else {}
    image = columns.get("image")
    if not isinstance(image, tfds.features.Image) or image.np_dtype not in (np.uint8, np.uint16):
        raise UserError(f"data.name = {settings.name!r}: has no feature 'image' that holds integer images.")
    height, width, channels = image.shape
    size = settings.image_size
    if not size and (height is None or height != width):
        raise UserError(
            f"data.image_size = 0: the images of {settings.name} are {height or 'any'} x {width or 'any'} pixels, "
            "not square of one size; give the size to resize and crop them to."
        )
    label = columns.get("label") if settings.labels else None
    num_classes = label.num_classes if isinstance(label, tfds.features.ClassLabel) else 0
    return ImageSpec(size=size or height, channels=1 if channels == 1 else 3, num_classes=num_classes or 0)


def read(
    settings: DataSettings,
    builder: tfds.core.DatasetBuilder,
    field: str,
    split: str,
    features: tfds.features.FeaturesDict,
    spec: ImageSpec,
) -> Source:
    """The images of `split`, which the config's `field` names."""
    try:
        rows = builder.as_data_source(split)
        return RecordSource(records=rows.data_source, features=features, spec=spec, identity=identity(builder, split))
    except (ValueError, NotImplementedError) as error:
        if not builder.is_prepared():
            raise not_prepared(settings, settings.name.partition(":")[2]) from None
        if isinstance(error, NotImplementedError):
            return through_tensorflow(settings, builder, split, spec)
        there = ", ".join(builder.info.splits)
        raise UserError(
            f"data.{field} = {split!r}: not a split of {settings.name} that holds images; "
            f"there are {there}, and slices such as 'train[:90%]'."
        ) from None


def identity(builder: tfds.core.DatasetBuilder, split: str) -> tuple:
    """The set with its config and version, the split, and of all that is prepared the bytes and shards' lengths."""
    prepared = ((name, it.num_bytes, tuple(it.shard_lengths)) for name, it in sorted(builder.info.splits.items()))
    return builder.info.full_name, split, tuple(prepared)


def through_tensorflow(
    settings: DataSettings, builder: tfds.core.DatasetBuilder, split: str, spec: ImageSpec
) -> ArraySource:
    """The images of `split` of a TFRecord set in memory, resized, in the order in which they are stored."""
    if importlib.util.find_spec("tensorflow") is None:
        raise UserError(
            f"data.name = {settings.name!r}: prepared in {builder.data_dir} as TFRecord, which needs TensorFlow: "
            "`pip install 'diffusion_jax[tensorflow]'`, or prepare it again with file_format='array_record'."
        )
    wanted = {"image": True, "label": True} if spec.num_classes else {"image": True}
    decoders = tfds.decode.PartialDecoding(wanted, decoders={"image": tfds.decode.SkipDecoding()})
    in_order = tfds.ReadConfig(interleave_cycle_length=1)
    rows = tfds.as_numpy(builder.as_dataset(split, decoders=decoders, read_config=in_order))
    examples = [example(row, spec) for row in rows]
    return to_arrays(examples)


def refuse_overlap(settings: DataSettings, builder: tfds.core.DatasetBuilder) -> None:
    """Raise `UserError` where an image stands in both splits."""
    if not builder.info.splits:  # tfds.testing.mock_data
        return
    taken: dict[str, list[tuple[int, int]]] = {}
    for file in builder.info.splits[settings.train_split].file_instructions:
        taken.setdefault(file.filename, []).append((file.skip, file.skip + file.take))
    for file in builder.info.splits[settings.held_out_split].file_instructions:
        for start, stop in taken.get(file.filename, ()):
            if max(start, file.skip) < min(stop, file.skip + file.take):
                raise UserError(
                    f"data.held_out_split = {settings.held_out_split!r}: shares images with "
                    f"data.train_split = {settings.train_split!r}; write for example 'train[:90%]' and 'train[90%:]'."
                )
