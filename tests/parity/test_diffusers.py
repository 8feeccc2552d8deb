"""Every stop of our solvers against every stop of diffusers' schedulers, on one denoiser known in closed form.

Both start from the same latents, are given the same noise, and must agree at each stop in float64. diffusers computes
in float32, here and there by a cast that cannot be switched off; for the comparison its modules are shown a torch and a
numpy whose `float32` is float64. A second run, as shipped, says that this has changed nothing but the last digits.

Where diffusers keeps x:

    VP    alpha x0 + sigma eps at its 1,000 betas. Its index k is our t = (k + 1) / 1000; its "index -1" is our t = 0.
    VE    x / alpha, whose noise is sigma / alpha: our `edm` schedule (alpha = 1) at the same sigmas.
    FLOW  (1 - t) x0 + t eps: our `rectified_flow`.

What differs on purpose; a row with a number is shown by `ON_PURPOSE`, and all else agrees as `PAIRS` says:

    diffusers 0.42                                       ours, and why
    -------------------------------------------------------------------------------------------------------------------
 1  DDIM clips x0 and keeps the eps of the unclipped     eps is derived again, so that x0 and eps stay a split of x; as
    x0, unless `use_clipped_model_output` is set         in diffusers' own DDPM and Heun
 2  DDIM's and PNDM's steps end at k - 1000 // N,        a step ends where the next one starts; the same where N
    wherever the next one starts                         divides 1,000
 3  DDIM may end at k = 0, with its noise                the last stop is the image, t = 0
    (`set_alpha_to_one=False`, PNDM's default)
 4  DDPM adds noise to the image where its last k is     no noise in the step to t = 0 (Ho et al. 2020, algorithm 2,
    above 0: of std 1e-10 with the small variance (a     line 3)
    floor under it), of sqrt(beta) with the large one
 5  below 15 steps DPM++ 3M, and always UniPC-3, is of   the order falls only in a step to t = 0, which is infinitely
    order 2 in the last step but one (by default)        far in log-SNR
 6  3M's second step is 2M's (`midpoint`), which halves  3M's second step goes along the straight line through both x0,
    the last difference                                  as its next ones go along a parabola (diffusers: `heun`)
 7  3M halves the parabola's last term, as published     so does `dpmpp_3m`; `exponential_3m`, of order 3, does not
 8  singlestep of order 3 has one `solver_type` for its  DPM-Solver-3 as published: `heun` in the second stage,
    second stage and its third                           `midpoint` in the third
 -  singlestep of order 2: steps of order 1 and 2 take   a step of ours is two of theirs, its middle in the middle of
    turns, the grid's odd stops are the middles          log-SNR: `steps` are 2 `steps` - 1 evaluations
 -  PNDM takes its first step twice, the second time in  one evaluation a step from the first on: DDIM, then the lower
    Heun's way: N + 1 evaluations                        orders' weights
 -  UniPC's last stop is not corrected                   neither is ours: it would cost one more evaluation
 -  DPM++ and UniPC tell the network whole k, where      the network is told the time of the stop
    sigmas are Karras's too
 -  Euler's methods start from sqrt(sigma^2 + 1) z where x = sigma(1) z on every schedule
    k is spaced `leading`
 -  DPM++ and UniPC space N + 1 stops `linspace` and     `discrete(spacing='linspace')` is Lin et al. 2023, Table 2, as
    leave out the last                                   in DDIM
 -  `trailing` has N + 1 steps for some N (61, 103, ...) always N steps
    by rounding
 -  FlowMatch spaces N stops from 1 to its least sigma   `uniform` and `shifted` end in a step as long as the others
    and adds 0
 -  zero terminal SNR ends in 2^-24 in the sigma spaces  alpha(1) is 0: solvers do not divide by it
 -  dynamic thresholding's `sample_max_value` is 1 by    `dynamic` has no upper bound on its quantile
    default, which makes it static
 -  Langevin steps (ScoreSdeVe) take norms averaged over an image depends on no other image of its batch
    the batch
"""

import functools
import importlib
import itertools
import os
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import plugs, rng
from diffusion_jax.diffusion.grids import GRIDS
from diffusion_jax.diffusion.schedule import SCHEDULES
from diffusion_jax.diffusion.solvers import SOLVERS
from diffusion_jax.diffusion.solvers.base import trajectory
from diffusion_jax.diffusion.thresholding import THRESHOLDS, thresholded
from tests.contracts.closed_form import mixture

os.environ["HF_HUB_OFFLINE"] = "1"  # schedulers are arithmetic: nothing is to be fetched
ABSENT = "nothing is compared with diffusers: pip install -e '.[parity]' -c constraints/parity.txt brings it and torch"
torch = pytest.importorskip("torch", reason=ABSENT)
diffusers = pytest.importorskip("diffusers", reason=ABSENT)

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning",  # diffusers calls np.array on a tensor
    "ignore:.*dpmsolver.*:FutureWarning",  # the algorithm of 2022, which diffusers would rather see retired
)

DATA = ((-1.2, 0.8), (0.3, 0.2), (0.4, 0.6))
"""Two Gaussians, the left one mostly outside [-1, 1], so that thresholds have something to do."""

LATENTS = np.array([-1.7, -0.6, 0.1, 0.8, 2.1, -0.2, 1.2, -2.4, 0.4, 1.5, -1.1, 0.3]).reshape(3, 2, 2, 1)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One of our solvers and the scheduler of diffusers that is to do the same.

    Attributes:
      ours: as a config names it.
      theirs: the class, less its last word.
      space: where the scheduler keeps x: VP, VE or FLOW.
      options: of the scheduler.
      step: of the scheduler's `step`.
      threshold: ours.
      steps: of ours.
      calls: of the scheduler's `step` in one step of ours; one in a step to sigma = 0.
      arrange: changes the scheduler after its `set_timesteps`.
    """

    ours: str
    theirs: str
    space: str = "VP"
    options: Mapping = field(default_factory=dict)
    step: Mapping = field(default_factory=dict)
    threshold: str = "none"
    steps: int = 10
    calls: int = 1
    arrange: Callable = lambda scheduler: None

    def __str__(self):
        options = {**self.options, **self.step}
        return f"{self.ours}, {self.theirs}({','.join(f'{key}={value}' for key, value in options.items())})"


# ------------------------------------------------------------------------------------------ diffusers


def within(calls):
    """Set `calls` - 1 stops between two of the scheduler's, at equal steps of log-SNR; none before sigma = 0."""

    def arrange(scheduler):
        last = scheduler.sigmas[-1:]
        stops = torch.log(scheduler.sigmas).clamp(min=-99.0)[:, None]
        sigmas = torch.exp(torch.lerp(stops[:-1], stops[1:], torch.arange(calls, dtype=stops.dtype) / calls)).flatten()
        if last == 0.0:
            sigmas = sigmas[: 1 - calls]
        timesteps = scheduler.timesteps.repeat_interleave(calls)[: len(sigmas)]
        scheduler.set_timesteps(len(sigmas))  # for its list of orders
        scheduler.timesteps, scheduler.sigmas = timesteps, torch.cat([sigmas, last])
        scheduler.set_begin_index(0)  # else it looks for its place by the timestep, of which there now are several

    return arrange


def start_once(scheduler):
    """Leave out the second try of the first step: count on as if it had been."""
    scheduler.timesteps = torch.unique(scheduler.timesteps).flip(0)
    step = scheduler.step

    def counted(*arguments, **options):
        stepped = step(*arguments, **options)
        scheduler.counter = 2
        return stepped

    scheduler.step = counted


def as_published(scheduler):
    """DPM-Solver-3 is of one `solver_type` in its second stage, of the other in its third."""
    within(3)(scheduler)
    step = scheduler.step

    def staged(*arguments, **options):
        order = scheduler.order_list[scheduler.step_index or 0]
        scheduler.register_to_config(solver_type="heun" if order == 2 else "midpoint")
        return step(*arguments, **options)

    scheduler.step = staged


def in_double(library):
    """torch or numpy, where float32 is another name of float64."""
    double = types.ModuleType(library.__name__)
    double.__dict__.update(vars(library), float32=library.float64)
    return double


def split(x, alpha, sigma):
    """(x0, eps) that DATA's ideal denoiser makes of x: an independent statement, in NumPy."""
    means, stds, shares = map(np.array, DATA)
    variance = alpha**2 * stds**2 + sigma**2
    off = x[..., None] - alpha * means
    share = shares * np.exp(-0.5 * off**2 / variance) / np.sqrt(variance)
    share /= share.sum(-1, keepdims=True)
    return (share * (means + alpha * stds**2 / variance * off)).sum(-1), (share * sigma / variance * off).sum(-1)


def network(pair, scheduler, i, x):
    """What the scheduler is told at its call i: the velocity, or eps of an x that it has scaled to unit variance."""
    k = scheduler.timesteps[i]
    if pair.space == "FLOW":
        t = float(scheduler.sigmas[i])
        x0, eps = split(x.numpy(), 1.0 - t, t)
        return eps - x0
    if hasattr(scheduler, "sigmas"):
        ratio = float(scheduler.sigmas[i])  # sigma / alpha
    else:
        ratio = float(1.0 / scheduler.alphas_cumprod[k] - 1.0) ** 0.5
    alpha = 1.0 / np.hypot(1.0, ratio)
    return split(scheduler.scale_model_input(x, k).numpy(), alpha, ratio * alpha)[1]


def made(pair, monkeypatch, double):
    """(the scheduler, the module that it is written in)."""
    peer = getattr(diffusers, pair.theirs + "Scheduler")
    module = sys.modules[peer.__module__]
    if double:
        monkeypatch.setattr(module, "torch", in_double(torch))
        monkeypatch.setattr(module, "np", in_double(np))
    scheduler = peer(**pair.options)
    scheduler.set_timesteps(pair.steps)
    pair.arrange(scheduler)
    return scheduler, module


def their_stops(pair, monkeypatch, x, noise, double):
    """All stops that the two have in common, [steps + 1, *x.shape]."""
    dtype = torch.float64 if double else torch.float32
    scheduler, module = made(pair, monkeypatch, double)
    stops = [torch.from_numpy(x).to(dtype)]
    for i, k in enumerate(scheduler.timesteps):
        z = torch.from_numpy(noise[i // pair.calls]).to(dtype)
        monkeypatch.setattr(module, "randn_tensor", lambda *_, z=z, **__: z, raising=False)
        told = torch.from_numpy(network(pair, scheduler, i, stops[-1])).to(dtype)
        stops.append(scheduler.step(told, k, stops[-1], **pair.step).prev_sample)
    return np.stack([stop.numpy() for stop in [*stops[: -1 : pair.calls], stops[-1]]])


# ------------------------------------------------------------------------------------------ ours


def schedule_and_times(pair, monkeypatch):
    """The row of `SCHEDULES` that is theirs, and their stops in its time."""
    with monkeypatch.context() as patch:
        scheduler, _ = made(pair, patch, double=True)
    if pair.space == "VP":
        name, times = "ddpm_linear", (scheduler.timesteps.numpy() + 1.0) / 1000.0
    else:
        sigmas = scheduler.sigmas[:-1].numpy()
        name = f"edm(sigma_max={sigmas[0]})" if pair.space == "VE" else "rectified_flow"
        times = sigmas / sigmas[0]
    end = 0.001 if scheduler.config.get("final_sigmas_type") == "sigma_min" else 0.0
    return name, (*times[:: pair.calls], end)


@functools.cache
def start(name, times):
    """(x, keys, noise of each step)."""
    sigma = plugs.build("schedule", name, SCHEDULES).sigma(jnp.float64(times[0]))
    keys = rng.example_keys(jax.random.key(3), jnp.arange(len(LATENTS)))
    noise = [np.array(rng.normal(rng.fold(keys, i), LATENTS.shape[1:], jnp.float64)) for i in range(len(times))]
    return float(sigma) * LATENTS, keys, noise


@functools.cache
def our_stops(text, threshold, name, times):
    """[steps + 1, *x.shape]."""
    schedule, solver = plugs.build("schedule", name, SCHEDULES), plugs.build("solver", text, SOLVERS)
    denoise = mixture(schedule, tuple(jnp.asarray(part, jnp.float64) for part in DATA))
    denoise = thresholded(denoise, schedule, plugs.build("threshold", threshold, THRESHOLDS))
    x, keys, _ = start(name, times)
    walk = jax.jit(lambda x, times: trajectory(denoise, schedule, solver, times, len(times) - 1, x, keys))
    return np.asarray(walk(x, jnp.asarray(times)))


def differences(pair, monkeypatch, double=True):
    """The largest difference at each stop, [steps + 1]."""
    name, times = schedule_and_times(pair, monkeypatch)
    x, _, noise = start(name, times)
    theirs = their_stops(pair, monkeypatch, x, noise, double)
    return np.abs(theirs - our_stops(pair.ours, pair.threshold, name, times)).max(axis=(1, 2, 3, 4))


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


# ------------------------------------------------------------------------------------------ the comparison

TRAILING = {"timestep_spacing": "trailing", "clip_sample": False}
LEADING = {"timestep_spacing": "leading", "clip_sample": False}
CLIPPED = {"timestep_spacing": "trailing", "clip_sample": True}
TO_THE_LEAST_SIGMA = {"lower_order_final": False, "final_sigmas_type": "sigma_min"}
SOLVER_3 = {"solver_order": 3, "algorithm_type": "dpmsolver", **TO_THE_LEAST_SIGMA}
THREE_M = {"solver_order": 3, "lower_order_final": False}
DYNAMIC = {"thresholding": True, "dynamic_thresholding_ratio": 0.7, "sample_max_value": 9.0}

PAIRS = [
    Pair(ours="ddim", theirs="DDIM", options=TRAILING),
    Pair(ours="ddim", theirs="DDIM", options=LEADING),
    Pair(ours="ddim(eta=0.5)", theirs="DDIM", options=TRAILING, step={"eta": 0.5}),
    Pair(ours="ddim(eta=1.0)", theirs="DDIM", options=TRAILING, step={"eta": 1.0}),
    Pair(ours="ddim", theirs="DDIM", options=CLIPPED, step={"use_clipped_model_output": True}, threshold="static"),
    Pair(
        ours="ddim",
        theirs="DDIM",
        options={**TRAILING, **DYNAMIC},
        step={"use_clipped_model_output": True},
        threshold="dynamic(quantile=0.7)",
    ),
    Pair(ours="ddpm", theirs="DDPM", options=LEADING),
    Pair(ours="ddpm(variance=1.0)", theirs="DDPM", options={**LEADING, "variance_type": "fixed_large"}),
    Pair(ours="ddpm", theirs="DDPM", options=LEADING | {"clip_sample": True}, threshold="static"),
    Pair(ours="ddim(eta=1.0)", theirs="DDPM", options=LEADING),
    Pair(ours="euler", theirs="EulerDiscrete", space="VE"),
    Pair(ours="euler", theirs="EulerDiscrete", space="VE", options={"use_karras_sigmas": True}),
    Pair(ours="ddim", theirs="EulerDiscrete", space="VE"),
    Pair(ours="euler_ancestral", theirs="EulerAncestralDiscrete", space="VE"),
    Pair(ours="ddim(eta=1.0)", theirs="EulerAncestralDiscrete", space="VE"),
    Pair(ours="heun", theirs="HeunDiscrete", space="VE", calls=2),
    Pair(ours="heun", theirs="HeunDiscrete", space="VE", calls=2, options={"use_karras_sigmas": True}),
    Pair(ours="heun", theirs="HeunDiscrete", space="VE", calls=2, options={"clip_sample": True}, threshold="static"),
    Pair(ours="lms(order=4)", theirs="LMSDiscrete", space="VE"),
    Pair(ours="lms(order=2)", theirs="LMSDiscrete", space="VE", step={"order": 2}),
    Pair(ours="dpm_solver_3", theirs="DPMSolverSinglestep", steps=9, calls=3, options=SOLVER_3, arrange=as_published),
    Pair(
        ours="dpmpp_2s",
        theirs="DPMSolverSinglestep",
        calls=2,
        options={"lower_order_final": True},
        arrange=within(2),
    ),
    Pair(ours="dpmpp_2m", theirs="DPMSolverMultistep"),
    Pair(ours="dpmpp_2m", theirs="DPMSolverMultistep", options=DYNAMIC, threshold="dynamic(quantile=0.7)"),
    Pair(ours="dpmpp_3m", theirs="DPMSolverMultistep", options={**THREE_M, "solver_type": "heun"}),
    Pair(ours="sde_dpmpp_2m", theirs="DPMSolverMultistep", options={"algorithm_type": "sde-dpmsolver++"}),
    Pair(ours="unipc(order=2)", theirs="UniPCMultistep"),
    Pair(ours="unipc(order=3)", theirs="UniPCMultistep", options={"solver_order": 3, **TO_THE_LEAST_SIGMA}),
    Pair(
        ours="pndm",
        theirs="PNDM",
        options={"timestep_spacing": "trailing", "skip_prk_steps": True, "set_alpha_to_one": True},
        arrange=start_once,
    ),
    Pair(ours="euler", theirs="FlowMatchEulerDiscrete", space="FLOW"),
    Pair(ours="heun", theirs="FlowMatchHeunDiscrete", space="FLOW", calls=2),
]


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_every_stop_is_theirs(pair, monkeypatch):
    """To 11 digits in float64 (they reach 13); as shipped, to those that float32 leaves at sigmas up to 157."""
    assert differences(pair, monkeypatch).max() < 1e-11
    assert differences(pair, monkeypatch, double=False).max() < 2e-3


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if pair.threshold != "none"], ids=str)
def test_thresholds_have_something_to_do(pair, monkeypatch):
    assert differences(replace(pair, threshold="none"), monkeypatch).max() > 1e-3


def test_churn_is_theirs(monkeypatch):
    """KarrasVe is Karras et al. 2022, algorithm 2, retired by now and with a loop of its own; its model says -eps."""
    module = importlib.import_module("diffusers.schedulers.deprecated.scheduling_karras_ve")
    sigmas = (60.0, 40.0, 14.0, 5.0, 1.5, 0.4, 0.1, 0.02, 0.0)  # churned from s_max = 50 to s_min = 0.05
    name, times = "edm(sigma_max=80.0)", tuple(sigma / 80.0 for sigma in sigmas)
    x, _, noise = start(name, times)
    scheduler = module.KarrasVeScheduler(s_churn=2.0, s_min=0.05, s_max=50.0, s_noise=1.003)
    scheduler.set_timesteps(len(sigmas) - 1)
    model = lambda x, sigma: torch.from_numpy(-split(x.numpy(), 1.0, sigma)[1])
    stops = [torch.from_numpy(x)]
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas)):
        monkeypatch.setattr(module, "randn_tensor", lambda *_, i=i, **__: torch.from_numpy(noise[i]))
        churned, higher = scheduler.add_noise_to_input(stops[-1], sigma)
        taken = scheduler.step(model(churned, higher), higher, sigma_next, churned)
        if sigma_next > 0.0:
            told = model(taken.prev_sample, sigma_next)
            taken = scheduler.step_correct(told, higher, sigma_next, churned, taken.prev_sample, taken.derivative)
        stops.append(taken.prev_sample)
    ours = our_stops("edm(churn=0.25,s_min=0.05,s_max=50.0,s_noise=1.003)", "none", name, times)
    np.testing.assert_allclose(ours, torch.stack(stops).numpy(), rtol=1e-11, atol=1e-11)


ON_PURPOSE = {
    "1 the eps of the unclipped x0": (7, Pair(ours="ddim", theirs="DDIM", options=CLIPPED, threshold="static")),
    "2 steps of 1000 // N": (5, Pair(ours="ddim", theirs="DDIM", options=TRAILING, steps=9)),
    "3 an end at k = 0": (10, Pair(ours="ddim", theirs="DDIM", options={**TRAILING, "set_alpha_to_one": False})),
    "4 noise on the image": (
        10,
        Pair(ours="ddpm(variance=1.0)", theirs="DDPM", options={**TRAILING, "variance_type": "fixed_large"}),
    ),
    "5 lower orders in 3M": (
        9,
        Pair(ours="dpmpp_3m", theirs="DPMSolverMultistep", options={"solver_order": 3, "solver_type": "heun"}),
    ),
    "5 lower orders in UniPC": (9, Pair(ours="unipc(order=3)", theirs="UniPCMultistep", options={"solver_order": 3})),
    "6 3M's second step": (2, Pair(ours="dpmpp_3m", theirs="DPMSolverMultistep", options=THREE_M)),
    "7 3M's half term": (
        3,
        Pair(ours="exponential_3m", theirs="DPMSolverMultistep", options={**THREE_M, "solver_type": "heun"}),
    ),
    "8 stages of one kind": (
        1,
        Pair(ours="dpm_solver_3", theirs="DPMSolverSinglestep", steps=9, calls=3, options=SOLVER_3, arrange=within(3)),
    ),
}
"""The first stop that differs; those before it are the same."""


@pytest.mark.parametrize("why", ON_PURPOSE)
def test_what_differs_on_purpose(why, monkeypatch):
    stop, pair = ON_PURPOSE[why]
    found = differences(pair, monkeypatch)
    assert found[:stop].max() < 1e-11
    assert found[stop] > 1e-6


# ------------------------------------------------------------------------------------------ schedules and grids

STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
BETAS = {
    "ddpm_linear": {},
    "scaled_linear": STABLE_DIFFUSION,
    "cosine_discrete": {"beta_schedule": "squaredcos_cap_v2"},
    "zero_terminal_snr(of='scaled_linear')": {**STABLE_DIFFUSION, "rescale_betas_zero_snr": True},
}


@pytest.mark.parametrize("name", BETAS)
def test_every_step_of_the_noise_schedule_is_theirs(name, monkeypatch):
    """alphas_cumprod[k] is alpha^2 at t = (k + 1) / 1000."""
    scheduler, _ = made(Pair(ours="ddim", theirs="DDIM", options=BETAS[name]), monkeypatch, double=True)
    bar, t = scheduler.alphas_cumprod.numpy(), jnp.arange(1.0, 1001.0) / 1000.0
    schedule = plugs.build("schedule", name, SCHEDULES)
    np.testing.assert_allclose(schedule.alpha(t) ** 2, bar, rtol=1e-11)
    np.testing.assert_allclose(schedule.sigma(t) ** 2, 1.0 - bar, rtol=1e-11)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_spacings_are_theirs(spacing):
    grid, schedule = GRIDS["discrete"](spacing=spacing), SCHEDULES["ddpm_linear"]()
    times = jax.jit(lambda steps: grid(schedule, steps))
    for steps in (1, 2, 3, 5, 7, 10, 18, 20, 25, 50, 100, 150, 250, 999, 1000):
        scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing)
        scheduler.set_timesteps(steps)
        ours = np.asarray(times(jnp.int32(steps)), np.float64)[:steps]
        np.testing.assert_allclose(ours, (scheduler.timesteps.numpy() + 1.0) / 1000.0, atol=1e-6)
