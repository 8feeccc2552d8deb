"""Solvers: how to walk from noise to an image with a denoiser. One file each; `SOLVERS` is the registry."""

from diffusion_jax.diffusion.solvers.ddim import DDIM
from diffusion_jax.diffusion.solvers.euler import Euler
from diffusion_jax.diffusion.solvers.heun import Heun

SOLVERS = {"ddim": DDIM, "euler": Euler, "heun": Heun}
