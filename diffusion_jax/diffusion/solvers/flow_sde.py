"""Euler-Maruyama on the SDE of a flow (Ma et al. 2024, section 2) in the schedule's straight frame."""

from dataclasses import dataclass

import jax.numpy as jnp

from diffusion_jax.diffusion.broadcast import over
from diffusion_jax.diffusion.schedule import Schedule
from diffusion_jax.diffusion.solvers.base import pytree
from diffusion_jax.diffusion.solvers.kernel import with_noise
from diffusion_jax.diffusion.straight import Straight
from diffusion_jax.types import Array, Denoiser


@pytree
@dataclass(frozen=True, kw_only=True)
class FlowSDE:
    """dx = velocity dt - w/2 score dt + sqrt(w) dw, with w = diffusion sigma: the same marginals for every w.

    With score = -eps / sigma the drift is velocity + diffusion eps / 2: unlike the SDE whose w is g(t)^2, it is regular
    from alpha = 0 to sigma = 0. It is stepped in the straight frame, for x / c, whose alpha is 1 - k tau and whose
    sigma is tau; for rectified flow that is x itself and t. At diffusion = 0, and in the step to s = 0, it is Euler's.
    """

    diffusion: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.diffusion, float) and not self.diffusion >= 0.0:
            raise ValueError(f"diffusion must be 0 or more, not {self.diffusion}")

    def init(self, x: Array) -> tuple:  # noqa: D102
        return ()

    def step(  # noqa: D102
        self, denoise: Denoiser, schedule: Schedule, x: Array, t: Array, s: Array, carry: tuple, keys: Array
    ) -> tuple[Array, tuple]:
        frame, d = Straight(schedule), denoise(x, t)
        diffusion = jnp.where(s > 0.0, self.diffusion, 0.0).astype(x.dtype)
        x = frame.move(x, t, s, frame.slope(d) + 0.5 * diffusion * d.eps)
        w = over(frame.time(t), x) * diffusion
        noise = over(frame.scale(s), x) * jnp.sqrt(w * over(frame.time(t) - frame.time(s), x))
        return with_noise(x, noise, keys), carry
