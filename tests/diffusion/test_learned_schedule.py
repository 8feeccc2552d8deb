"""The learned schedule: whatever its parameters are, it is a schedule; and what training it minimises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion.prediction import PREDICTIONS
from diffusion_jax.diffusion.schedule import Learned, first_time, logsnr, with_derivatives
from diffusion_jax.diffusion.time_sampling import TIME_SAMPLINGS
from diffusion_jax.diffusion.weighting import WEIGHTINGS

pytestmark = pytest.mark.usefixtures("quick_compilation")

LEARNED = Learned(hidden=16)
STD = 0.6


def wild(seed):
    """Parameters far from where they start: bends of up to some hundred, between and beside the ends."""
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        name: scale * jax.random.normal(key, (16,)) for name, scale, key in zip("abc", (40, 40, 10), keys, strict=True)
    }


@pytest.fixture(params=[0, 1, 2])
def schedule(request):
    params = LEARNED.init(jax.random.key(0)) if request.param == 0 else wild(request.param)
    return LEARNED.bind(params)


def test_ends_are_the_papers(schedule, x64):
    """VDM: gamma from -13.3 to 5; here the noise of gamma_0 is taken off, so that the data are at t = 0."""
    ends = jnp.float64([0.0, 1.0])
    np.testing.assert_allclose(schedule.alpha(ends), [1.0, 1.0 / np.sqrt(1.0 + np.exp(5.0) - np.exp(-13.3))], rtol=1e-9)
    assert float(schedule.sigma(ends)[0]) == 0.0
    np.testing.assert_allclose(logsnr(schedule, ends)[1], -5.0, atol=1e-7)


def test_signal_falls_and_variance_is_preserved(schedule, x64):
    t = jnp.linspace(0.0, 1.0, 401)
    assert np.all(np.diff(np.asarray(logsnr(schedule, t))[1:]) < 0.0)
    np.testing.assert_allclose(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, 1.0, rtol=1e-12)


def test_time_inverts_logsnr(schedule, x64):
    t = jnp.linspace(0.0, 1.0, 201)
    np.testing.assert_allclose(schedule.time(logsnr(schedule, t)), t, atol=1e-8)
    np.testing.assert_allclose(logsnr(schedule, first_time(schedule).astype(jnp.float64)), np.log(1e6), atol=1e-3)


def test_derivatives_pass_through_the_inverse(x64):
    """dt/dlogsnr is one over dlogsnr/dt, and the parameters' gradient is that of finite differences."""
    params, t = LEARNED.init(jax.random.key(3)), jnp.linspace(0.1, 0.9, 9)
    schedule = LEARNED.bind(params)
    ratio, slope = jax.jvp(lambda t: logsnr(schedule, t), (t,), (jnp.ones_like(t),))
    back = jax.jvp(schedule.time, (ratio,), (jnp.ones_like(ratio),))[1]
    np.testing.assert_allclose(back * slope, 1.0, rtol=1e-8)
    time = lambda b: jnp.sum(LEARNED.bind(params | {"b": b}).time(ratio))
    gradient, h = jax.grad(time)(params["b"]), 1e-4
    for unit in (0, 7):
        moved = [float(time(params["b"].at[unit].add(sign * h))) for sign in (1, -1)]
        np.testing.assert_allclose(gradient[unit], (moved[0] - moved[1]) / (2 * h), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_dtype_is_that_of_the_time(dtype, x64):
    schedule, t = LEARNED.bind(LEARNED.init(jax.random.key(0))), jnp.linspace(0.0, 1.0, 5, dtype=dtype)
    for value in (schedule.alpha(t), schedule.sigma(t), schedule.time(logsnr(schedule, t)), schedule.label(t)):
        assert value.dtype == dtype


def test_derivatives_are_finite_in_float32(schedule):
    for value in with_derivatives(schedule, jnp.linspace(0.01, 1.0, 50)):
        assert np.all(np.isfinite(np.asarray(value)))


def bound(params, u):
    """The loss of the ideal denoiser of N(0, s^2) under `elbo`, uniform times: its mean over x, at each time."""
    schedule = LEARNED.bind(params)
    t, slope = jax.jvp(lambda u: TIME_SAMPLINGS["uniform"]()(schedule, u), (u,), (jnp.ones_like(u),))
    snr = jnp.exp(logsnr(schedule, t))
    floor = snr * STD**2 / (1.0 + snr * STD**2)
    return WEIGHTINGS["elbo"]()(PREDICTIONS["eps"](schedule=schedule), t, slope) * floor


def test_the_bound_does_not_depend_on_the_way_but_its_variance_does(x64):
    """Kingma et al. 2021, section 5: 1/2 ln((1 + 10^6 s^2) / (1 + e^-5 s^2)) for any parameters; and descending the
    mean of the square descends the variance."""
    u = jnp.linspace(0.0, 1.0, 4001)
    mean = lambda values: jnp.trapezoid(values, u)
    expected = 0.5 * np.log((1.0 + 1e6 * STD**2) / (1.0 + np.exp(-5.0) * STD**2))
    square = jax.jit(jax.value_and_grad(lambda params: mean(bound(params, u) ** 2)))
    params, seen = jax.tree.map(lambda p: p.astype(jnp.float64), LEARNED.init(jax.random.key(0))), []
    for _ in range(20):
        value, gradient = square(params)
        seen.append(float(value))
        params = jax.tree.map(lambda p, g: p - 0.3 * g, params, gradient)
    np.testing.assert_allclose(float(mean(bound(params, u))), expected, rtol=1e-5)
    np.testing.assert_allclose(float(mean(bound(wild(1), u))), expected, rtol=1e-2)
    assert np.all(np.diff(seen) < 0.0)
    assert seen[-1] >= expected**2  # the least there is: every time with the same loss


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logsnr_min": 20.0}, "logsnr_min must lie below logsnr_max, .* not be 20.0 and"),
        ({"hidden": 0}, "hidden must be positive, not 0"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(ValueError, match=message):
        Learned(**options)


def test_a_level_of_noise_has_one_name_whatever_the_parameters_are(schedule, x64):
    """google-research/vdm gives its network (gamma - gamma_min) / (gamma_max - gamma_min), from -13.3 to 5.

    Here sigma^2 / alpha^2 = exp(gamma) - exp(-13.3): gamma = log(exp(-logsnr) + exp(-13.3)).
    """
    noise = np.linspace(-5.0, 12.0, 7)  # log-SNR
    gamma = np.log(np.exp(-noise) + np.exp(-13.3))
    np.testing.assert_allclose(schedule.label(schedule.time(jnp.asarray(noise))), (gamma + 13.3) / 18.3, rtol=1e-6)
