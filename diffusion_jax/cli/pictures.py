"""Grids of images as PNG."""

import io
import math

import numpy as np
from PIL import Image

GAP = 96
"""Grey level of the lines between images."""


def png(images: np.ndarray, columns: int = 10, least: int = 480) -> bytes:
    """A grid of uint8 [N,H,W,C] images, row by row, enlarged by a whole factor to at least `least` pixels of width."""
    images = np.pad(images, ((0, 0), (0, 1), (0, 1), (0, 0)), constant_values=GAP)
    count, height, width, channels = images.shape
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    grid = np.full((rows * columns, height, width, channels), GAP, np.uint8)
    grid[:count] = images
    grid = grid.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    grid = grid.reshape(rows * height, columns * width, channels)
    factor = max(1, math.ceil(least / (columns * width)))
    picture = Image.fromarray(grid[..., 0] if channels == 1 else grid)
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def alternating(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """first[0], second[0], first[1], ...: side by side in a grid with an even number of columns."""
    return np.stack([first, second], axis=1).reshape(-1, *first.shape[1:])
