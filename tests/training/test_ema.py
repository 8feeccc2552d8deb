"""Averages of the weights: the power-function profile of Karras et al. 2024 against its published figures and sum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import plugs
from diffusion_jax.errors import UserError
from diffusion_jax.settings import TrainSettings
from diffusion_jax.training.ema import RULES, Power, power_gamma
from diffusion_jax.training.step import Trainer
from tests.training import toys


def power_weights(std, n):
    """How much each of the updates 1..n counts: the integral of (gamma + 1) tau^gamma / n^(gamma + 1) over its step."""
    edges = (np.arange(n + 1) / n) ** (power_gamma(std) + 1.0)
    return np.diff(edges)


@pytest.mark.parametrize(("std", "gamma"), [(0.05, 16.972), (0.10, 6.937)])
def test_exponents_are_the_published_ones(std, gamma):
    """Karras et al. 2024, section 3.1: 5 % is gamma 16.97 and 10 % is 6.94."""
    np.testing.assert_allclose(power_gamma(std), gamma, atol=5e-4)
    np.testing.assert_allclose(Power(std=std).gamma, gamma, atol=5e-4)


def test_the_widest_profile_is_the_plain_mean():
    np.testing.assert_allclose(power_gamma(12.0**-0.5), 0.0, atol=1e-12)
    np.testing.assert_allclose(power_weights(12.0**-0.5, 10), 0.1)


@pytest.mark.parametrize("std", [0.02, 0.05, 0.1, 0.25])
def test_std_is_the_standard_deviation_of_the_profile(std):
    """By quadrature: of the density that the exponent stands for, on [0, 1]."""
    tau, weights = (np.arange(200_000) + 0.5) / 200_000, power_weights(std, 200_000)
    mean = np.sum(weights * tau)
    np.testing.assert_allclose(np.sqrt(np.sum(weights * (tau - mean) ** 2)), std, rtol=1e-5)


@pytest.mark.parametrize("std", [0.05, 0.1, 0.25])
def test_the_recursion_makes_the_profile(std):
    """e <- beta e + (1 - beta) theta over 300 updates weighs them as the sum says; what was before is forgotten."""
    n = 300
    decays = np.asarray(jax.vmap(Power(std=std))(jnp.arange(1.0, n + 1)), np.float64)
    assert decays[0] == 0.0
    later = np.append(np.cumprod(decays[::-1])[::-1][1:], 1.0)  # product of the decays after each update
    np.testing.assert_allclose((1.0 - decays) * later, power_weights(std, n), rtol=1e-4, atol=1e-9)


def test_decays_of_late_steps_keep_their_digits():
    """At a million updates 1 - beta is 1.8e-5: 0.3 % is what float32 leaves of it; 1 - 1/n alone would cost 3 %."""
    gamma = power_gamma(0.05)
    for n in (10**4, 10**5, 10**6):
        decay = Power(std=0.05)(jnp.float32(n))
        assert decay.dtype == jnp.float32
        np.testing.assert_allclose(1.0 - np.float64(decay), -np.expm1((gamma + 1.0) * np.log1p(-1.0 / n)), rtol=4e-3)


def test_a_run_keeps_the_power_average():
    """Through the trainer: the leader falls by 0.5 times each batch's mean; the average is the weighted sum of it."""
    settings = TrainSettings(
        optimizer="sgd", learning_rate=0.5, clip_norm=0.0, batch_size=4, ema={"narrow": "power(std=0.1)"}
    )
    trainer = Trainer(toys.leader_and_follower(), settings, seed=0)
    means = np.array([0.25, -0.5, 1.0, 0.125, 0.75, -0.25])
    state, step = trainer.init(), jax.jit(trainer.step)
    for mean in means:
        state, _ = step(state, toys.batch(mean), {})
    expected = np.sum(power_weights(0.1, len(means)) * (1.0 - 0.5 * np.cumsum(means)))
    np.testing.assert_allclose(state.ema["narrow"]["leader"]["w"], expected, rtol=1e-6)


@pytest.mark.parametrize("text", ["power(std=0.0)", "power(std=0.3)", "power(std=-0.05)", "power(width=0.1)"])
def test_impossible_widths_are_refused(text):
    with pytest.raises(UserError, match=r"train.ema.main.*power.*(std|width)"):
        plugs.build("train.ema.main", text, RULES)
