"""What a command does before it uses jax: the persistent compilation cache, in the user's cache directory."""

import os

import jax

from diffusion_jax.files import cache_directory


def prepare() -> None:
    """Turn the persistent compilation cache on; JAX_COMPILATION_CACHE_DIR puts it elsewhere, or empty, turns it off."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
