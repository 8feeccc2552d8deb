"""Masked places whose latents are continuous, and a small diffusion model in each of them (MAR: Li et al. 2024).

Training hides a share of the places, 70 % at least (section 4.2; the law is the published code's), and learns to
denoise what stands there, each place's latent x alone, given the vector z that the transformer has for that place:

    share ~ N(1, 0.25^2) within [0.7, 1]
    loss  = E |y - y(x_t | t, z)|^2 + L_vlb's part          x_t = alpha(t) x + sigma(t) eps          eq. 1, with y = eps

By default y is v. With eps and the paper's schedule x is read at t = 1 from the 5e-5 of it that is left there: a small
network is never so exact.

Decoding begins with nothing known. Each of S steps computes z, draws the latents of some places with a solver, and
keeps them; the places come in an order drawn at random. Of N there are floor(N cos(pi s / 2 S)) still masked after step
s, and at least one fewer than before.

All places are computed in every step, so that shapes depend on nothing; the paper leaves out those it does not keep.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial

import jax
import jax.numpy as jnp

from diffusion_jax import plugs, rng
from diffusion_jax.diffusion.broadcast import over
from diffusion_jax.diffusion.grids import GRIDS
from diffusion_jax.diffusion.objectives import OBJECTIVES, Objective
from diffusion_jax.diffusion.prediction import PREDICTIONS, Prediction, check_pairing
from diffusion_jax.diffusion.schedule import SCHEDULES
from diffusion_jax.diffusion.solvers import SOLVERS
from diffusion_jax.diffusion.solvers.base import Solver, solve
from diffusion_jax.diffusion.time_sampling import stratified, uniform
from diffusion_jax.diffusion.weighting import WEIGHTINGS
from diffusion_jax.errors import require
from diffusion_jax.families.transformer_draws import Shown
from diffusion_jax.families.transformer_maskgit import ranks, shares, still_masked
from diffusion_jax.networks.flops import multiply_adds_of
from diffusion_jax.networks.sequence import Places
from diffusion_jax.types import Array, Denoised, Denoiser, Metrics, TokenSpec, Tree

STEPS, SOLVER, GRID, SOLVER_STEPS, GUIDANCE_SCHEDULE = 64, "ddpm", "uniform", 100, "linear"
"""Where nothing is said, as in the paper: section 4.1 and 4.2, appendix B."""

SPREAD = 0.25
"""Standard deviation of the share that is hidden."""

LEVELS = 256
"""L_vlb's last term asks for cells, as if latents had 8 bits within [-1, 1]: the published code's way, after ADM's."""

COLDEST = 1e-4
"""A temperature below this is taken for this one: nothing is divided by 0."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `generate`, all traced but the kind of solver."""

    guidance: Array  # f32[]
    guidance_grows: Array  # bool[]
    temperature: Array  # f32[]
    shares: Array  # f32[T], from `transformer_maskgit.shares`
    steps: Array  # i32[]
    solver: Solver
    times: Array  # f32[MAX_STEPS + 1], from the grid
    solver_steps: Array  # i32[]


@dataclass(frozen=True, kw_only=True)
class MAR:
    """A row of `transformer.DECODINGS`. Its tokens are latents, f32[T,channels] of an image.

    Attributes:
      network: whose MLP learns a place's y and variance.
      tokens: places and channels.
      least: share of the places that training hides at least.
      repeats: times and noises that the loss draws for each vector z.
      schedule: from `diffusion.schedule.SCHEDULES`.
      prediction: from `diffusion.prediction.PREDICTIONS`.
      objective: from `diffusion.objectives.OBJECTIVES`, one that learns a variance.
      weighting: from `diffusion.weighting.WEIGHTINGS`.
    """

    network: Places
    tokens: TokenSpec
    least: float = 0.7
    repeats: int = 4
    schedule: str = "cosine_discrete"
    prediction: str = "v"
    objective: str = "learned_variance"
    weighting: str = "simple"

    reads = ("guidance", "guidance_schedule", "temperature", "steps", "solver", "grid", "solver_steps")

    def __post_init__(self) -> None:
        if not isinstance(self.network, Places):
            raise ValueError("needs a network of continuous latents, such as mar")
        if not 0.0 <= self.least < 1.0:
            raise ValueError(f"least must lie in [0, 1), not be {self.least}")
        if self.repeats < 1:
            raise ValueError(f"repeats must be at least 1, not {self.repeats}")
        check_pairing("family.decoding", self.predicted, f"{self.prediction} with {self.schedule}")
        if self.learned.channels(1) != 2:
            raise ValueError("objective must be learned_variance, for the network says a variance, too")

    @cached_property
    def predicted(self) -> Prediction:
        """What the MLP regresses on, bound to the schedule."""
        schedule = plugs.build("family.decoding: schedule", self.schedule, SCHEDULES)
        return plugs.build("family.decoding: prediction", self.prediction, PREDICTIONS, schedule=schedule)

    @cached_property
    def learned(self) -> Objective:
        """The objective of a place's latent, which it takes for an image of one pixel."""
        return plugs.build(
            "family.decoding: objective",
            self.objective,
            OBJECTIVES,
            prediction=self.predicted,
            time_sampling=uniform(),
            weighting=plugs.build("family.decoding: weighting", self.weighting, WEIGHTINGS),
            levels=LEVELS,
        )

    # ------------------------------------------------------------------------------------------ training

    def losses(
        self, params: Tree, latents: Array, label: Array | None, keys: Array, dropout: Array, smoothing: float
    ) -> tuple[Array, Metrics]:
        """The loss f32[B] of latents f32[B,T,channels], in the mean over an image's hidden places.

        `smoothing` is of tokens, and 0 here.
        """
        hidden = self.hidden(rng.fold(keys, 0))
        z = self.network.encode(params, latents, hidden, label, dropout)
        losses = self.place_losses(params, latents, z, rng.fold(keys, 1))
        return jnp.sum(jnp.where(hidden, losses, 0.0), axis=1) / jnp.sum(hidden.astype(jnp.float32), axis=1), {}

    def hidden(self, keys: Array) -> Array:
        """bool[B,T]: ceil(share T) places, each set of so many as likely as any other."""
        T, low = self.tokens.length, (self.least - 1.0) / SPREAD
        draw = lambda key: 1.0 + SPREAD * jax.random.truncated_normal(key, low, 0.0)
        count = jnp.ceil(rng.draw(rng.fold(keys, 0), draw) * T).astype(jnp.int32)
        order = rng.draw(rng.fold(keys, 1), lambda key: jax.random.permutation(key, T))
        return order < jnp.clip(count, 1, T)[:, None]

    def place_losses(self, params: Tree, latents: Array, z: Array, keys: Array) -> Array:
        """Eq. 1 for each place, f32[B,T]: the mean over `repeats` times and noises for the same z (section 3.2)."""
        (B, T, C), R = latents.shape, self.repeats
        x0 = jnp.broadcast_to(latents[:, None], (B, R, T, C)).reshape(-1, 1, 1, C)
        z = jnp.broadcast_to(z[:, None], (B, R, *z.shape[1:])).reshape(-1, 1, z.shape[-1])
        u = rng.draw(rng.fold(keys, 0), lambda key: stratified(key, jnp.arange(R * T))).reshape(-1)
        noise = rng.draw(rng.fold(keys, 1), lambda key: jax.random.split(key, R * T)).reshape(-1)
        losses, _ = self.learned.loss(lambda x, t: self.denoised(params, x, t, z), x0, u, noise)
        return jnp.mean(losses.reshape(B, R, T), axis=1)

    def denoised(self, params: Tree, x: Array, t: Array, z: Array) -> Array:
        """The MLP's output f32[n,T,1,2 channels] for x f32[n,T,1,channels] at t f32[] or f32[n] under z [n,T,width]."""
        prediction, (n, T) = self.predicted, x.shape[:2]
        seen = over(prediction.input_scale(t), x) * x
        time = jnp.broadcast_to(prediction.schedule.label(t).reshape(-1, 1), (n, T))
        return self.network.denoise(params, seen[:, :, 0], time, z)[:, :, None]

    # ------------------------------------------------------------------------------------------ sampling

    def options(
        self,
        guidance: Array,
        guidance_schedule: str,
        temperature: Array,
        steps: int,
        solver: str,
        grid: str,
        solver_steps: int,
    ) -> Options:
        """Options of `generate`; 0 steps and empty strings are what stands at the top of this file.

        Raises:
          UserError: for unknown rows, or more steps than there are.
        """
        T = self.tokens.length
        require(steps <= T, "sample.steps", steps, f"must be at most {T}, the number of places")
        stops = plugs.build("sample.grid", grid or GRID, GRIDS)
        solver_steps = solver_steps or stops.steps or min(SOLVER_STEPS, stops.most)
        fits = solver_steps <= stops.most and stops.steps in (None, solver_steps)
        require(fits, "sample.solver_steps", solver_steps, f"does not fit the grid {grid or GRID}")
        return Options(
            guidance=guidance,
            guidance_grows=jnp.bool_((guidance_schedule or GUIDANCE_SCHEDULE) == "linear"),
            temperature=temperature,
            shares=jnp.asarray(shares(steps or min(STEPS, T), T)),
            steps=jnp.int32(steps or min(STEPS, T)),
            solver=plugs.build("sample.solver", solver or SOLVER, SOLVERS),
            times=stops(self.predicted.schedule, jnp.int32(solver_steps)),
            solver_steps=jnp.int32(solver_steps),
        )

    def generate(self, params: Tree, keys: Array, shown: Shown, options: Options) -> Array:
        """Latents f32[n,T,channels], those of one image for each of keys key[n]."""
        nothing = jnp.zeros((len(keys), self.tokens.length, self.tokens.channels))
        return self.filled(params, nothing, jnp.zeros(nothing.shape[:2], bool), keys, shown, options)

    def inpaint(self, params: Tree, latents: Array, known: Array, keys: Array, shown: Shown, options: Options) -> Array:
        """Latents f32[n,T,channels], those that are not `known` bool[n,T] made anew."""
        return self.filled(params, latents, known, keys, shown, options)

    def filled(self, params: Tree, latents: Array, known: Array, keys: Array, shown: Shown, options: Options) -> Array:
        """Latents f32[n,T,channels] with others in all places that are not `known` bool[n,T]."""
        count, T = jnp.sum(~known, axis=1), self.tokens.length
        lots = rng.draw(rng.fold(keys, 0), lambda key: jax.random.uniform(key, (T,)))
        order = ranks(jnp.where(known, jnp.inf, lots))  # of the places to fill the one with 0 comes last

        def step(s: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
            latents, left = state
            after = jnp.clip(still_masked(count, options.shares[s]), 0, jnp.maximum(left - 1, 0))
            masked, own = order < left[:, None], rng.fold(rng.fold(keys, 1), s)
            drawn = self.drawn(params, latents, masked, own, self.shown(shown, after, options), options)
            return jnp.where((masked & (order >= after[:, None]))[..., None], drawn, latents), after

        return jax.lax.fori_loop(0, options.steps, step, (latents, count))[0]

    def shown(self, shown: Shown, left: Array, options: Options) -> Shown:
        """`shown`, its weight grown with the share of places that are known after the step: all but `left` i32[n].

        As in Muse (Chang et al. 2023, section 2.7).
        """
        share = 1.0 - left.astype(jnp.float32) / self.tokens.length
        return shown.grown(share[:, None, None, None], options.guidance_grows)

    def drawn(self, params: Tree, latents: Array, masked: Array, keys: Array, shown: Shown, options: Options) -> Array:
        """A latent for each place, f32[n,T,channels], given those that are not `masked` bool[n,T].

        Temperature tau multiplies all noise, at the start and in the solver's steps (section 4.1, where the start's is
        left alone). Solvers are linear in x, x0, eps and noise: so x / tau walks with plain noise, and is multiplied by
        tau where it is looked at.
        """
        z = self.network.encode(params, shown.repeated(latents), shown.repeated(masked), shown.label)
        denoise = self.denoiser(params, z, shown)
        tau = jnp.maximum(options.temperature, COLDEST)

        def cold(x: Array, t: Array) -> Denoised:
            x0, eps, spread = denoise(tau * x, t)
            return Denoised(x0 / tau, eps / tau, spread)

        noise = rng.normal(rng.fold(keys, 0), (self.tokens.length, 1, self.tokens.channels))
        schedule, keys = self.predicted.schedule, rng.fold(keys, 1)
        noise = schedule.sigma(options.times[0]) * noise
        x = solve(cold, schedule, options.solver, options.times, options.solver_steps, noise, keys)
        return tau * x[:, :, 0]

    def denoiser(self, params: Tree, z: Array, shown: Shown) -> Denoiser:
        """(x f32[n,T,1,channels], t) -> what the MLP makes of it under z [copies * n,T,width].

        Guidance is that of y; the variance is what the labels say alone.
        """

        def denoise(x: Array, t: Array) -> Denoised:
            times = shown.repeated(t) if t.ndim else t
            y, variance = jnp.split(self.denoised(params, shown.repeated(x), times, z), 2, axis=-1)
            y = jnp.concatenate([shown.merged(y), variance[: len(x)]], axis=-1)
            return self.learned.denoised(x, y, t)

        return denoise

    # ------------------------------------------------------------------------------------------ what it costs

    def run(self, params: Tree, label: Array | None) -> Tree:
        """One run of the transformer, of all places of one image; the MLP's are counted as parts of it."""
        latents, masked = (jnp.zeros(s.shape, s.dtype) for s in self.network.example[:2])
        return self.network.encode(params, latents, masked, label)

    def counted(self, note: Callable[[float], None]) -> "MAR":
        """The same, which says at each run of the transformer how many images it was given.

        A run of the MLP over all places counts as the share of a transformer's run that its FLOPs are.
        """
        params = jax.eval_shape(self.network.init, jax.random.key(0))
        latents, masked, label, x, time = self.network.example
        z = jax.eval_shape(self.network.encode, params, latents, masked, label)
        part = multiply_adds_of(self.network.denoise, params, x, time, z)
        part /= multiply_adds_of(self.network.encode, params, latents, masked, label)

        def encode(params: Tree, latents: Array, *others: Array | None) -> Array:
            jax.debug.callback(partial(note, len(latents)))
            return self.network.encode(params, latents, *others)

        def denoise(params: Tree, x: Array, *others: Array) -> Array:
            jax.debug.callback(partial(note, part * len(x)))
            return self.network.denoise(params, x, *others)

        return replace(self, network=replace(self.network, encode=encode, denoise=denoise))
