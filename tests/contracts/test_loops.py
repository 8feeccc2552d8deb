"""The loops around a solver: what they keep, what they compile, and the way back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import plugs
from diffusion_jax.diffusion.grids import GRIDS, MAX_STEPS
from diffusion_jax.diffusion.schedule import SCHEDULES, first_time
from diffusion_jax.diffusion.solvers import SOLVERS
from diffusion_jax.diffusion.solvers.base import reverse, solve, trajectory
from diffusion_jax.types import Denoised

SCHEDULE = SCHEDULES["rectified_flow"]()
KINDS = ["heun", "dpmpp_2m", "unipc(order=3)", "lms", "ddpm"]


def denoise(x, t):
    """Of white noise around 0.5, with something for a buffer to hold."""
    x0 = 0.5 + 0.1 * jnp.tanh(x)
    return Denoised(x0, (x - SCHEDULE.alpha(t) * x0) / SCHEDULE.sigma(t))


def walk(text, steps, shape=(2, 4, 4, 1)):
    x = jax.random.normal(jax.random.key(0), shape)
    keys = jax.random.split(jax.random.key(1), shape[0])
    times = GRIDS["uniform"]()(SCHEDULE, jnp.int32(steps))
    return denoise, SCHEDULE, plugs.build("solver", text, SOLVERS), times, x, keys


@pytest.mark.parametrize("text", KINDS)
def test_a_trajectory_is_what_solve_passes_through(text):
    """Its last stop is the image, its first the noise, and stop k the result of the grid's first k steps."""
    model, schedule, solver, times, x, keys = walk(text, 6)
    stops = jax.jit(lambda x: trajectory(model, schedule, solver, times, 6, x, keys))(x)
    run = jax.jit(lambda steps, x: solve(model, schedule, solver, times, steps, x, keys))
    assert stops.shape == (7, *x.shape)
    np.testing.assert_array_equal(stops[0], x)
    for k in (1, 3, 6):
        np.testing.assert_allclose(stops[k], run(jnp.int32(k), x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("text", KINDS)
def test_memory_does_not_grow_with_the_number_of_steps(text):
    """One program serves 1 step and 1,000, and its buffers hold some images, not a thousand; a trajectory's do."""
    model, schedule, solver, times, x, keys = walk(text, MAX_STEPS, (8, 32, 32, 3))

    def run(steps, x):
        return solve(model, schedule, solver, times, steps, x, keys)

    needs = jax.jit(run).lower(jnp.int32(1), x).compile().memory_analysis()
    assert needs.temp_size_in_bytes + needs.output_size_in_bytes < 30 * x.nbytes
    kept = jax.jit(lambda x: trajectory(model, schedule, solver, times, 100, x, keys)).lower(x).compile()
    assert kept.memory_analysis().output_size_in_bytes >= 101 * x.nbytes


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", ["rectified_flow", "edm", "vp_linear", "scaled_linear"])
def test_a_grid_backwards_rises_from_the_image_to_the_noise(name, grid):
    schedule, steps = plugs.build("schedule", name, SCHEDULES), 4
    times = plugs.build("grid", grid, GRIDS)(schedule, jnp.int32(steps))
    back = np.asarray(reverse(schedule, times, jnp.int32(steps)))
    assert back.shape == (MAX_STEPS + 1,)
    assert 0.0 < back[0] <= float(first_time(schedule)) * (1 + 1e-6)
    assert np.all(np.diff(back[: steps + 1]) > 0.0)
    np.testing.assert_array_equal(back[1 : steps + 1], np.asarray(times[:steps])[::-1])
