"""Every test runs on 8 virtual CPU devices, with warnings as errors and strict promotion of ranks and dtypes."""

import os
import resource

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """No test reads or writes the user's cache."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.getbasetemp().parent / "cache")


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Thousands of compiled programs take gigabytes: they go at a module's end, once there are too many."""
    yield
    if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 2 * 1024**2:  # KiB
        jax.clear_caches()


@pytest.fixture(scope="module")
def quick_compilation():
    """For modules whose programs run for milliseconds and compile for seconds."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
