"""Bits per dimension of held-out images, under families that have a likelihood."""

from typing import Any

import numpy as np

from diffusion_jax.evaluation import bootstrap

RESAMPLINGS = 1000


def summarise(bits: np.ndarray) -> dict[str, Any]:
    """The mean of f[N] bits per dimension, one an image, with its 95 % bootstrap interval; lower is better."""
    mean = float(bits.mean())
    index = bootstrap.indices(np.random.default_rng(0), len(bits), len(bits), RESAMPLINGS)
    low, high = bootstrap.interval(bits[index].mean(1), mean)
    return {"value": mean, "interval": (low, high), "images": len(bits), "better": "lower"}


def render(row: dict[str, Any]) -> str:
    """One line."""
    low, high = row["interval"]
    what = "with uniform noise of one grey level" if row["dequantised"] else "discrete, not dequantised"
    return (
        f"bits per dimension {row['value']:.3f} ({low:.3f} .. {high:.3f}) of {row['images']} held-out images, {what}."
    )
