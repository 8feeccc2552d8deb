"""What the guides show works as they show it."""

import re
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion.schedule import SCHEDULES
from diffusion_jax.diffusion.solvers.base import solve
from tests.contracts.closed_form import TWO, curves, logsnr_grid, mixture, transported

GUIDE = Path(__file__).parents[1] / "docs" / "adding_a_solver.md"


@pytest.fixture
def midpoint(monkeypatch):
    (source,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert len(source.splitlines()) <= 60
    module = types.ModuleType("midpoint")
    monkeypatch.setitem(sys.modules, "midpoint", module)
    exec(compile(source, str(GUIDE), "exec"), vars(module))
    return module.Midpoint()


@pytest.mark.parametrize("name", ["vp_linear", "edm", "rectified_flow"])
def test_the_solver_of_the_guide_is_of_order_two(midpoint, name):
    """On a mixture: on a single Gaussian the midpoint method happens to measure 3."""
    with jax.enable_x64(True):
        schedule = SCHEDULES[name]()
        denoise = mixture(schedule, tuple(jnp.asarray(a) for a in TWO))
        run = jax.jit(lambda times, steps, x: solve(denoise, schedule, midpoint, times, steps, x, keys))
        keys, counts, errors = jax.random.split(jax.random.key(0), 2), [128, 256, 512], []
        for count in counts:
            times = logsnr_grid(name, count)
            x = curves(name, times[0])[1] * np.array([-1.0, 0.7])
            padded = jnp.zeros(1001).at[: count + 1].set(times)
            got = run(padded, jnp.int32(count), jnp.asarray(x).reshape(2, 1, 1, 1))
            errors.append(np.abs(np.asarray(got).reshape(2) - transported(x, name, times[0], times[-1], TWO)).mean())
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert abs(slope - 2.0) < 0.12, errors
