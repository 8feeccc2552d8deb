"""How things are measured: seconds, a peak of FLOP/s to compare with, memory, a trace of the device."""

import resource
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.networks.flops import Counts


def device() -> dict[str, Any]:
    """What the numbers were measured on."""
    return {"device": jax.devices()[0].device_kind, "devices": jax.device_count(), "jax": jax.__version__}


def gflops(counts: Counts) -> dict[str, float]:
    """1e-9 times the multiply-adds of one function, counted three ways."""
    shapes, compiled, cost_analysis = (number / 1e9 for number in counts)
    return {"gflops": shapes, "gflops_compiled": compiled, "gflops_cost_analysis": cost_analysis}


def timed(act: Callable[[], Any]) -> tuple[float, Any]:
    """(seconds, what `act` returned)."""
    start = time.perf_counter()
    result = act()
    return time.perf_counter() - start, result


def durations(act: Callable[[], Any], repetitions: int, profile: str | None = None) -> list[float]:
    """Seconds of each of `repetitions` calls, after one that is not counted; see `trace` for `profile`."""
    act()
    with trace(profile):
        return [timed(act)[0] for _ in range(repetitions)]


def trace(directory: str | None) -> AbstractContextManager:
    """Within, XLA's operations on the device are recorded for TensorBoard and Perfetto, where a directory is given."""
    return jax.profiler.trace(directory) if directory else nullcontext()


def peak_flops(dtype: str, repetitions: int = 5) -> float:
    """FLOP/s of a large square matrix product on every device at once."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    x = jnp.ones((size, size), dtype)
    factors = [jax.device_put(x, device) for device in jax.devices()]
    multiply = jax.jit(lambda x: x @ x)

    def repeat() -> None:
        jax.block_until_ready([multiply(x) for x in factors])

    return len(factors) * 2.0 * size**3 / float(np.median(durations(repeat, repetitions)))


def memory(program: jax.stages.Compiled) -> dict[str, Any]:
    """Peak memory in bytes: of the device, where it keeps count.

    Where it does not (CPUs), what the program needs by the compiler's own sum, arguments and results included, and the
    peak of the whole process.
    """
    stats = jax.local_devices()[0].memory_stats()
    if stats:
        return {"device_peak_bytes": stats["peak_bytes_in_use"]}
    size = program.memory_analysis()
    parts = size.argument_size_in_bytes + size.output_size_in_bytes + size.temp_size_in_bytes
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return {
        "program_bytes": parts - size.alias_size_in_bytes,
        "process_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
    }
