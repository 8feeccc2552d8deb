"""Does the model make images, or repeat them? Distances in pixels from made images to their nearest training image.

Interpolating or copying training images fools every distance between distributions: this check is not optional.
"""

import numpy as np

from diffusion_jax.evaluation import neighbours


def measure(made: np.ndarray, held_out: np.ndarray, train: np.ndarray) -> dict[str, float | int]:
    """Compare how near made and held-out images come to the training images.

    Args:
      made: u8[N,H,W,C].
      held_out: u8[M,H,W,C].
      train: u8[T,H,W,C].

    Returns:
      `samples` and `held_out`: the median Euclidean distance to the nearest training image, pixels in [-1,1];
      `exact_copies`: the number of made images that equal a training image in every pixel.
    """
    known = {image.tobytes() for image in train}
    flat_train = _flat(train)
    return {
        "samples": float(np.median(neighbours.nearest(_flat(made), flat_train))),
        "held_out": float(np.median(neighbours.nearest(_flat(held_out), flat_train))),
        "exact_copies": sum(image.tobytes() in known for image in made),
    }


def _flat(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1).astype(np.float64) / 127.5 - 1.0
