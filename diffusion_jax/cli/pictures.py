"""Grids of images as PNG."""

import io
import math

import numpy as np
from PIL import Image


def png(images: np.ndarray, columns: int = 10, least: int = 480) -> bytes:
    """A grid of uint8 [N,H,W,C] images, row by row, enlarged by a whole factor to at least `least` pixels of width."""
    count, height, width, channels = images.shape
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    grid = np.zeros((rows * columns, height, width, channels), np.uint8)
    grid[:count] = images
    grid = grid.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    grid = grid.reshape(rows * height, columns * width, channels)
    factor = max(1, math.ceil(least / (columns * width)))
    picture = Image.fromarray(grid[..., 0] if channels == 1 else grid)
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
