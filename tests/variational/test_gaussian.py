"""Gaussians against their moments, SciPy's densities, and integrals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from diffusion_jax.variational.gaussian import STANDARD, Gaussian, kl, log_density, reparameterised

PAIRS = [((0.3, 0.7), (-0.4, 1.9)), ((-2.0, 0.1), (0.0, 1.0)), ((1.0, 3.0), (1.0, 3.0)), ((0.0, 1.5), (2.0, 0.5))]
"""(mean, std) of two Gaussians."""


def gaussian(mean, std):
    return Gaussian(jnp.float32(mean), jnp.log(jnp.float32(std)))


def test_a_reparameterised_draw_has_the_moments_and_their_gradients():
    """Of z = m + s eps: E z = m, E z^2 = m^2 + s^2, so dE z^2/dm = 2 m and dE z^2/dlog s = 2 s^2."""
    eps = jnp.asarray(np.random.default_rng(0).normal(size=200_000), jnp.float32)
    q = gaussian(0.8, 0.6)
    z = np.asarray(reparameterised(q, eps), np.float64)
    moments = [z.mean(), z.var(), stats.skew(z), stats.kurtosis(z)]
    np.testing.assert_allclose(moments, [0.8, 0.36, 0.0, 0.0], atol=0.02)
    gradient = jax.grad(lambda q: jnp.mean(jnp.square(reparameterised(q, eps))))(q)
    np.testing.assert_allclose(gradient, (1.6, 0.72), rtol=0.02)


@pytest.mark.parametrize(("q", "_"), PAIRS)
def test_log_density(q, _):
    z = np.linspace(-3.0, 4.0, 9, dtype=np.float32)
    np.testing.assert_allclose(log_density(gaussian(*q), z), stats.norm(*q).logpdf(z), rtol=1e-4)
    np.testing.assert_allclose(log_density(STANDARD, z), stats.norm.logpdf(z), rtol=1e-5)


@pytest.mark.parametrize(("q", "p"), PAIRS)
def test_kl_is_the_integral(q, p):
    """Of q log(q / p), by quadrature; and to N(0, 1), in the closed form of the paper."""

    def integral(p):
        a, b = stats.norm(*q), stats.norm(*p)
        integrand = lambda z: a.pdf(z) * (a.logpdf(z) - b.logpdf(z))
        return integrate.quad(integrand, q[0] - 12 * q[1], q[0] + 12 * q[1], epsabs=1e-10)[0]

    np.testing.assert_allclose(kl(gaussian(*q), gaussian(*p)), integral(p), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(kl(gaussian(*q)), integral((0.0, 1.0)), rtol=1e-4, atol=1e-6)
    m, s = q
    np.testing.assert_allclose(kl(gaussian(*q)), 0.5 * (m * m + s * s - 1.0 - np.log(s * s)), rtol=1e-4, atol=1e-6)


def test_kl_of_a_residual_posterior_needs_no_prior():
    """Vahdat & Kautz 2020, eq. 2: of N(mu + d, (sigma s)^2) to N(mu, sigma^2), (d^2/sigma^2 + s^2 - log s^2 - 1) / 2.

    That is the KL of N(d / sigma, s^2) to N(0, 1), whatever mu and sigma are.
    """
    mu, sigma, d, s = 1.7, 0.3, -0.5, 1.4
    published = 0.5 * (d**2 / sigma**2 + s**2 - np.log(s**2) - 1.0)
    np.testing.assert_allclose(kl(gaussian(mu + d, sigma * s), gaussian(mu, sigma)), published, rtol=1e-4)
    np.testing.assert_allclose(kl(gaussian(d / sigma, s)), published, rtol=1e-4)
