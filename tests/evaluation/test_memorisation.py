import numpy as np
import pytest

from diffusion_jax.evaluation import memorisation


def test_counts_exact_copies_and_measures_distances(generator):
    train, held_out, made = generator.integers(0, 256, (3, 20, 4, 4, 3)).astype(np.uint8)
    made[:5] = train[[1, 1, 2, 3, 4]]
    made[5] = train[7]
    made[5, 0, 0, 0] ^= 1
    found = memorisation.measure(made, held_out, train)
    pixels = lambda x: x.reshape(20, -1) / 127.5 - 1.0
    nearest = lambda a: np.linalg.norm(pixels(a)[:, None] - pixels(train)[None], axis=-1).min(1)
    assert found["exact_copies"] == 5
    assert found["samples"] == pytest.approx(np.median(nearest(made)))
    assert found["held_out"] == pytest.approx(np.median(nearest(held_out)))


def test_a_model_that_only_copies_is_found_out(generator):
    train, held_out = generator.integers(0, 256, (2, 30, 4, 4, 1)).astype(np.uint8)
    found = memorisation.measure(train, held_out, train)
    assert found["exact_copies"] == 30
    assert found["samples"] == pytest.approx(0.0, abs=1e-6)
    assert found["held_out"] > 0.5
