"""Real digits scattered over a canvas of 32x32 pixels: a set for two-stage models that still fits two CPU cores.

A canvas has 2 to 4 digits, each whole and in a cell of its own, at a random place within it. Its class is the largest
digit on it: what a model has to get right is not one shape but how several stand together.
"""

import numpy as np

from diffusion_jax.data import digits
from diffusion_jax.data.source import ArraySource, Dataset
from diffusion_jax.errors import require
from diffusion_jax.settings import DataSettings
from diffusion_jax.types import ImageSpec

READS = ("image_size",)
SIZE, CELL, DIGIT = 32, 16, 8
CELLS = (SIZE // CELL) ** 2
TRAIN, HELD_OUT = 20_000, 4_000
_WORDS = (
    2 + 4 * CELLS
)  # of the random stream, a canvas: class, how many, and for each cell which, where and in which order


def build(settings: DataSettings, argument: str) -> Dataset:
    """Images f32[N,32,32,1] on the digits' 17 grey levels, 10 classes: 20,000 and 4,000, made anew at every start.

    Training canvases show training digits alone, held-out canvases held-out digits alone (see `digits.build`).

    Raises:
      UserError: for `data.image_size` other than 32, and for an argument after "digits_canvas:".
    """
    require(not argument, "data.name", f"digits_canvas:{argument}", "write plainly 'digits_canvas'")
    require(
        settings.image_size in (0, SIZE), "data.image_size", settings.image_size, f"canvases are {SIZE} pixels wide"
    )
    single = digits.build(DataSettings(name="digits"), argument)
    return Dataset(
        name="digits_canvas",
        spec=ImageSpec(size=SIZE, channels=1, num_classes=10, levels=single.spec.levels),
        train=compose(single.train, TRAIN, stream=0),
        held_out=compose(single.held_out, HELD_OUT, stream=1),
    )


def compose(source: ArraySource, count: int, stream: int) -> ArraySource:
    """The first `count` canvases f32[count,32,32,1] of the digits in `source`, and the largest digit on each.

    All classes are equally likely: the class is drawn first, then 1 to 3 further digits no larger than it. Canvas i is
    made from block i of the random stream number `stream`, words whose values NumPy guarantees for ever, so that it
    does not depend on `count`.
    """
    words = np.random.Philox(key=np.array([stream, 1], np.uint64)).random_raw(_WORDS * count).reshape(count, _WORDS)
    label = (words[:, 0] % 10).astype(np.int32)
    number = 2 + words[:, 1] % 3
    which, image_of, place, order = np.split(words[:, 2:], 4, axis=1)
    shown = which % (label[:, None].astype(np.uint64) + 1)  # digits 0, ..., class
    rank = np.argsort(np.argsort(order, axis=1), axis=1)  # the cell of rank 0 has the class itself
    shown = np.where(rank == 0, label[:, None], shown).astype(np.int64)
    by_digit = np.argsort(source.label, kind="stable")  # the images of a digit side by side
    sizes = np.bincount(source.label, minlength=10)
    chosen = by_digit[(np.cumsum(sizes) - sizes)[shown] + (image_of % sizes[shown].astype(np.uint64)).astype(np.int64)]
    free = CELL - DIGIT + 1
    down, right = (place % free).astype(np.int64), (place // free % free).astype(np.int64)
    canvas = np.full((count, SIZE, SIZE, 1), -1.0, np.float32)
    for cell in range(CELLS):
        i = np.flatnonzero(rank[:, cell] < number)
        top, left = CELL * (cell // 2) + down[i, cell], CELL * (cell % 2) + right[i, cell]
        rows, columns = (start[:, None] + np.arange(DIGIT) for start in (top, left))
        canvas[i[:, None, None], rows[:, :, None], columns[:, None, :]] = source.image[chosen[i, cell]]
    return ArraySource(image=canvas, label=label)
