"""diffusion_jax: four families of image generators on one training loop."""

__version__ = "0.1.0"
