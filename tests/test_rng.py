"""Keys: pure functions of (seed, name, step, index), and unrelated to each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from diffusion_jax import rng


def test_a_key_depends_on_seed_name_step_and_index_and_nothing_else():
    keys = [rng.stream(seed, name, step) for seed in (0, 1) for name in ("init", "train") for step in (None, 0, 1)]
    words = {tuple(np.asarray(jax.random.key_data(key)).tolist()) for key in keys}
    assert len(words) == len(keys)
    again = rng.stream(rng.stream(1, "train"), "noise", jnp.int32(7))
    assert again == rng.stream(jax.jit(lambda seed: rng.stream(jax.random.key(seed), "train"))(1), "noise", 7)


def test_an_example_draws_the_same_in_any_company():
    key = rng.stream(0, "noise")
    together = rng.normal(rng.example_keys(key, jnp.arange(8)), (3, 3))
    reordered = rng.normal(rng.example_keys(key, jnp.array([5, 2])), (3, 3))
    np.testing.assert_array_equal(together[jnp.array([5, 2])], reordered)


@pytest.mark.parametrize(("draw", "law"), [("normal", "norm"), ("uniform", "uniform")])
def test_draws_follow_their_law(draw, law):
    keys = rng.example_keys(rng.stream(3, "test"), jnp.arange(4096))
    values = rng.normal(keys, ()) if draw == "normal" else rng.uniform(keys)
    assert stats.kstest(np.asarray(values), law).pvalue > 1e-3
    first, second = (rng.normal(rng.fold(keys, i), ()) for i in (0, 1))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.06
