"""Coefficients of time against images: alpha[B] * x[B,H,W,C]."""

from diffusion_jax.types import Array


def over(coefficient: Array, x: Array) -> Array:
    """Reshape f32[] or f32[B] so that it multiplies x[B, ...] example by example, in x's dtype."""
    return coefficient.reshape(coefficient.shape + (1,) * (x.ndim - coefficient.ndim)).astype(x.dtype)
