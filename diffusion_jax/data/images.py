"""From image files to u8[H,W,C]: decode, bring to grey or RGB, resize and crop. Pillow only."""

from typing import BinaryIO

import numpy as np
from PIL import Image


def plain(image: Image.Image) -> Image.Image:
    """Decode `image` and bring it to mode "L" where it has no colour, else "RGB".

    Transparency is laid on white; 16 bits a pixel are cut to the upper 8; of an animation the first frame is taken.

    Raises:
      OSError: and, with broken files, nearly anything else that a decoder may trip over.
    """
    image.load()
    if image.mode in ("L", "RGB"):
        return image if "transparency" not in image.info else plain(image.convert("RGBA"))
    if image.mode == "1":
        return image.convert("L")
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion clips instead of scaling
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        whole = image.convert("RGBA")
        opaque = Image.alpha_composite(Image.new("RGBA", whole.size, "white"), whole)
        return opaque.convert("L" if image.mode in ("LA", "La") else "RGB")
    return image.convert("RGB")


def decode(file: BinaryIO) -> Image.Image:
    """The image in `file`, of whatever format Pillow reads, decoded in full, as `plain` gives it."""
    with Image.open(file) as image:
        return plain(image)


def square(image: Image.Image, size: int) -> Image.Image:
    """Shorter side to `size` pixels, then the centre `size` x `size`; `size` 0 leaves the image as it is.

    As in ADM (openai/guided-diffusion, `image_datasets.center_crop_arr`), on which published figures rest: halved with
    a box filter while at least twice as large, then bicubic, which Pillow antialiases when it shrinks.
    """
    if size == 0 or image.size == (size, size):
        return image
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def pixels(image: Image.Image, channels: int) -> np.ndarray:
    """u8[H,W,`channels`] of an image in mode "L" or "RGB"; `channels` is 1 or 3."""
    array = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    return array[..., None] if channels == 1 else array
