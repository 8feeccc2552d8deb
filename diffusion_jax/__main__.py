"""`python -m diffusion_jax` is the console script `diffusion-jax`."""

from diffusion_jax.cli.main import run

if __name__ == "__main__":
    run()
