"""Spectral normalisation against the singular value decomposition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.adversarial import spectral
from tests.arrays import normals


def with_singular_values(values, inputs, outputs, seed):
    """A matrix of these singular values, with orthonormal vectors at random."""
    generator = np.random.default_rng(seed)
    left, right = (np.linalg.qr(generator.normal(size=(n, len(values))))[0] for n in (inputs, outputs))
    return jnp.asarray(left @ np.diag(values) @ right.T, jnp.float32)


PARAMS = {
    "conv": {"kernel": with_singular_values([5.0, 2.0, 0.5], 18, 4, 1).reshape(3, 3, 2, 4), "bias": normals(4)},
    "block": {"dense": {"kernel": with_singular_values([0.3, 0.1], 5, 7, 2)}},
    "scale": normals(3),
}


def kernels(params):
    return np.asarray(params["conv"]["kernel"]).reshape(18, 4), np.asarray(params["block"]["dense"]["kernel"])


def iterated(rounds, params=PARAMS):
    vectors = spectral.begin(params, jax.random.key(0))
    for _ in range(rounds):
        vectors = spectral.advance(params, vectors)
    return vectors


@pytest.mark.parametrize("normalise", [lambda p: spectral.normalise(p, iterated(15)), spectral.exactly])
def test_kernels_have_spectral_norm_one_and_nothing_else_changes(normalise):
    normalised = normalise(PARAMS)
    for kernel, raw, sigma in zip(kernels(normalised), kernels(PARAMS), (5.0, 0.3), strict=True):
        np.testing.assert_allclose(np.linalg.svd(kernel, compute_uv=False)[0], 1.0, rtol=1e-5)
        np.testing.assert_allclose(kernel, raw / sigma, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(normalised["conv"]["bias"], PARAMS["conv"]["bias"])
    np.testing.assert_array_equal(normalised["scale"], PARAMS["scale"])


def test_vectors_are_the_right_singular_vectors():
    vectors = iterated(15)
    for name, kernel in zip(("conv/kernel", "block/dense/kernel"), kernels(PARAMS), strict=True):
        right = np.linalg.svd(kernel)[2][0]
        np.testing.assert_allclose(np.abs(vectors[name] @ right), 1.0, rtol=1e-5)


def test_one_round_a_step_keeps_up_with_a_kernel_that_moves():
    """From good vectors, over 30 small steps at random: sigma is never off by more than 1 %."""
    vectors, params = iterated(15), PARAMS
    for step in range(30):
        move = lambda leaf, step=step: leaf + 0.02 * normals(*leaf.shape, seed=step)
        params = jax.tree.map(move, params)
        vectors = spectral.advance(params, vectors)
        norm = np.linalg.norm(kernels(spectral.normalise(params, vectors))[0], 2)
        assert abs(norm - 1.0) < 0.01


def test_the_derivative_is_that_of_the_paper():
    """(G - <G, W/sigma> a b^T) / sigma with singular vectors a, b of the largest value (Miyato et al. 2018, eq. 12)."""
    kernel = PARAMS["block"]["dense"]["kernel"]
    towards = normals(5, 7, seed=5)
    params = {"dense": {"kernel": kernel}}
    vectors = iterated(15, params)
    loss = lambda params: jnp.sum(towards * spectral.normalise(params, vectors)["dense"]["kernel"])
    left, values, right = np.linalg.svd(np.asarray(kernel, np.float64))
    along = np.sum(np.asarray(towards) * np.asarray(kernel)) / values[0]
    expected = (np.asarray(towards) - along * np.outer(left[:, 0], right[0])) / values[0]
    np.testing.assert_allclose(jax.grad(loss)(params)["dense"]["kernel"], expected, rtol=1e-4, atol=1e-4)


def test_a_kernel_of_zeros_stays_and_has_a_finite_derivative():
    """As residual branches begin in some networks."""
    params = {"dense": {"kernel": jnp.zeros((3, 2))}}
    vectors = spectral.advance(params, spectral.begin(params, jax.random.key(0)))
    for normalise in (lambda p: spectral.normalise(p, vectors), spectral.exactly):
        np.testing.assert_array_equal(normalise(params)["dense"]["kernel"], np.zeros((3, 2)))
    slope = jax.grad(lambda p: jnp.sum(spectral.normalise(p, vectors)["dense"]["kernel"]))(params)
    assert np.all(np.isfinite(slope["dense"]["kernel"]))
