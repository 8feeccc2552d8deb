"""Three digits in the three channels of an image: 1,000 modes, for measuring which of them a model leaves out.

Mode 100 a + 10 b + c has digit a in the first channel, b in the second and c in the third. All modes are equally
likely, and within them all images of a digit. Metz et al. 2017, section 3.3.1, stack MNIST's digits so.
"""

import numpy as np

from diffusion_jax.data import digits
from diffusion_jax.data.source import ArraySource, Dataset
from diffusion_jax.errors import require
from diffusion_jax.settings import DataSettings
from diffusion_jax.types import ImageSpec

READS = digits.READS
MODES = 1000
TRAIN, HELD_OUT = 60_000, 30_000


def build(settings: DataSettings, argument: str) -> Dataset:
    """Images f32[N,8,8,3] without labels, on the digits' 17 grey levels: 60,000 and 30,000, made anew at every start.

    Training stacks are of training digits alone, held-out stacks of held-out digits alone (see `digits.build`).

    Raises:
      UserError: for `data.image_size` other than 8, and for an argument after "stacked_digits:".
    """
    require(not argument, "data.name", f"stacked_digits:{argument}", "write plainly 'stacked_digits'")
    single = digits.build(settings, argument)
    train, _ = stack(single.train, TRAIN, stream=0)
    held_out, _ = stack(single.held_out, HELD_OUT, stream=1)
    return Dataset(
        name="stacked_digits",
        spec=ImageSpec(size=8, channels=3, num_classes=0, levels=single.spec.levels),
        train=ArraySource(image=train, label=None),
        held_out=ArraySource(image=held_out, label=None),
    )


def stack(source: ArraySource, count: int, stream: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `count` stacks f32[count,8,8,3] of the digits in `source`, and their modes i64[count] in [0, 1000).

    Stack i is made from block i of the random stream number `stream`, four words whose values NumPy guarantees for
    ever: the first says which mode, the others which image of each digit. So it does not depend on `count`.
    """
    words = np.random.Philox(key=np.array([stream, 0], np.uint64)).random_raw(4 * count).reshape(count, 4)
    mode = (words[:, 0] % MODES).astype(np.int64)
    digit = np.stack([mode // 100, mode // 10 % 10, mode % 10], axis=1)
    by_digit = np.argsort(source.label, kind="stable")  # the images of a digit side by side
    sizes = np.bincount(source.label, minlength=10)
    place = (words[:, 1:] % sizes[digit].astype(np.uint64)).astype(np.int64)
    chosen = by_digit[(np.cumsum(sizes) - sizes)[digit] + place]
    return np.concatenate([source.image[chosen[:, channel]] for channel in range(3)], axis=-1), mode
