"""Solvers: how to walk from noise to an image with a denoiser. One file each; `SOLVERS` is the registry."""

from diffusion_jax.diffusion.solvers.base import Solver
from diffusion_jax.diffusion.solvers.ddim import DDIM
from diffusion_jax.diffusion.solvers.ddpm import DDPM
from diffusion_jax.diffusion.solvers.dpm_solver_3 import DPMSolver3
from diffusion_jax.diffusion.solvers.dpmpp_2m import DPMpp2M
from diffusion_jax.diffusion.solvers.dpmpp_2s import DPMpp2S
from diffusion_jax.diffusion.solvers.dpmpp_3m import DPMpp3M, Exponential3M
from diffusion_jax.diffusion.solvers.edm import EDMStochastic
from diffusion_jax.diffusion.solvers.euler import Euler
from diffusion_jax.diffusion.solvers.euler_ancestral import EulerAncestral
from diffusion_jax.diffusion.solvers.euler_maruyama import EulerMaruyama
from diffusion_jax.diffusion.solvers.flow_sde import FlowSDE
from diffusion_jax.diffusion.solvers.heun import Heun
from diffusion_jax.diffusion.solvers.lms import LMS
from diffusion_jax.diffusion.solvers.pndm import PNDM
from diffusion_jax.diffusion.solvers.predictor_corrector import PredictorCorrector
from diffusion_jax.diffusion.solvers.rk45 import RK45
from diffusion_jax.diffusion.solvers.sde_dpmpp_2m import SDEDPMpp2M
from diffusion_jax.diffusion.solvers.unipc import UniPC

SOLVERS = {
    "ddim": DDIM,
    "ddpm": DDPM,
    "dpm_solver_3": DPMSolver3,
    "dpmpp_2m": DPMpp2M,
    "dpmpp_2s": DPMpp2S,
    "dpmpp_3m": DPMpp3M,
    "edm": EDMStochastic,
    "euler": Euler,
    "euler_ancestral": EulerAncestral,
    "euler_maruyama": EulerMaruyama,
    "exponential_3m": Exponential3M,
    "flow_sde": FlowSDE,
    "heun": Heun,
    "lms": LMS,
    "pndm": PNDM,
    "predictor_corrector": PredictorCorrector,
    "rk45": RK45,
    "sde_dpmpp_2m": SDEDPMpp2M,
    "unipc": UniPC,
}


def draws_noise(solver: Solver) -> bool:
    """Whether a solver is of an SDE: one of an ODE can be walked backwards, from an image to its noise."""
    always = (DDPM, EulerMaruyama, PredictorCorrector, SDEDPMpp2M)
    return isinstance(solver, always) or any(getattr(solver, name, 0.0) > 0.0 for name in ("eta", "churn", "diffusion"))
