"""The perceptual term of a tokenizer's loss: how far apart two images are in the maps of a network that is frozen.

Its parameters are no part of the model. Training is given them as `ctx.frozen["perceptual"]`, which `load` makes.
"""

import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import jax.numpy as jnp
import numpy as np

from diffusion_jax.errors import require
from diffusion_jax.networks import perceptual as networks
from diffusion_jax.types import Array, ImageSpec, Tree


class Perceptual(Protocol):
    """A row of `PERCEPTUALS`, built of its options and of the images' `spec`."""

    weight: float

    def load(self, classifier: Callable[[], Tree]) -> Tree:
        """The parameters; `classifier` gives those of the one that evaluation fits to the training images."""
        ...

    def __call__(self, params: Tree, x: Array, y: Array) -> Array:
        """The distance f32[B] of images f32[B,H,W,C], without the weight."""
        ...


def _check(weight: float) -> None:
    if not weight > 0.0:
        raise ValueError(f"weight must be positive, not {weight}")


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """The mean distance over the maps of the classifier by which samples are judged; all channels weigh alike.

    A tokenizer that was trained with it has seen the judge: compare its Fréchet distances among such tokenizers only.
    """

    spec: ImageSpec
    weight: float = 1.0

    def __post_init__(self) -> None:
        _check(self.weight)
        if self.spec.num_classes < 2:
            raise ValueError("needs data with classes")

    def load(self, classifier: Callable[[], Tree]) -> Tree:
        """See `Perceptual`."""
        return classifier()["network"]

    def __call__(self, params: Tree, x: Array, y: Array) -> Array:
        """See `Perceptual`."""
        maps, others = (networks.classifier(params, images) for images in (x, y))
        return networks.distance(maps, others, [jnp.ones(m.shape[-1]) for m in maps]) / len(maps)


LIN = "lin{}.model.1.weight"


@dataclass(frozen=True, kw_only=True)
class LPIPS:
    """Zhang et al. 2018: maps of VGG16, and how much each channel of them counts.

    `path` is an .npz file with the arrays of two published files, under their names and in their order of axes:
    "features.N.weight" [c',c,3,3] and "features.N.bias" [c'] of torchvision's vgg16 (N = 0, 2, 5, ..., 28), and
    "linL.model.1.weight" [1,c,1,1] (L = 0, ..., 4) of richzhang/PerceptualSimilarity's weights/v0.1/vgg.pth. Without
    any of the second file all channels weigh alike. Others are not looked at. docs/networks.md says how to make it.
    """

    spec: ImageSpec
    path: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        _check(self.weight)
        if self.spec.size < networks.LEAST:
            raise ValueError(f"needs images of at least {networks.LEAST} pixels a side, and {self.spec.size} is less")

    def load(self, classifier: Callable[[], Tree]) -> Tree:
        """See `Perceptual`.

        Raises:
          UserError: where there is no such file, or it lacks an array.
        """
        arrays, number, blocks = self.arrays(), 0, []
        for block in networks.VGG16:
            layers = []
            for _ in block:
                weight, bias = (arrays[f"features.{number}.{name}"] for name in ("weight", "bias"))
                layers.append({"kernel": weight.transpose(2, 3, 1, 0), "bias": bias})
                number += 2
            blocks.append(layers)
            number += 1
        alike = [np.ones(block[-1], np.float32) for block in networks.VGG16]
        return {
            "vgg": blocks,
            "channels": [arrays.get(LIN.format(i), ones).reshape(-1) for i, ones in enumerate(alike)],
        }

    def arrays(self) -> dict[str, np.ndarray]:
        """What the file holds of `expected`, f32."""
        field = "family.perceptual: option 'path' of lpips"
        try:
            with np.load(self.path, allow_pickle=False) as file:
                found = {name: file[name] for name in expected() if name in file}
        except (OSError, ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile):
            found = None
        require(found is not None, field, self.path, "must be an .npz file that can be read")
        weighed = any(name in found for name in map(LIN.format, range(len(networks.VGG16))))
        for name, shape in expected(weighed).items():
            is_right = name in found and found[name].shape == shape and np.issubdtype(found[name].dtype, np.floating)
            require(is_right, field, self.path, f"must hold {name!r}, numbers of shape {shape}")
        return {name: array.astype(np.float32) for name, array in found.items()}

    def __call__(self, params: Tree, x: Array, y: Array) -> Array:
        """See `Perceptual`."""
        maps, others = (networks.vgg16(params["vgg"], images) for images in (x, y))
        return networks.distance(maps, others, params["channels"])


def expected(weighed: bool = True) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the arrays in the file of `LPIPS`; the weights of channels among them where `weighed`."""
    shapes, number, before = {}, 0, 3
    for i, block in enumerate(networks.VGG16):
        for channels in block:
            shapes[f"features.{number}.weight"] = (channels, before, 3, 3)
            shapes[f"features.{number}.bias"] = (channels,)
            number, before = number + 2, channels
        if weighed:
            shapes[LIN.format(i)] = (1, before, 1, 1)
        number += 1
    return shapes


PERCEPTUALS = {"classifier": Classifier, "lpips": LPIPS}
