"""Averages chosen after training, from the stored ones."""

import jax
import numpy as np
import pytest
from scipy import integrate

from diffusion_jax import plugs
from diffusion_jax.errors import UserError
from diffusion_jax.settings import CheckpointSettings, TrainSettings
from diffusion_jax.training import posthoc
from diffusion_jax.training.checkpoint import Checkpoints
from diffusion_jax.training.ema import RULES
from diffusion_jax.training.posthoc import Snapshot
from diffusion_jax.training.step import Trainer
from tests.training import toys

END = 4096


def gamma(std):
    """From (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) = std^2 by bisection."""
    low, high = 0.0, 1e4
    for _ in range(100):
        middle = 0.5 * (low + high)
        wider = (middle + 1) / ((middle + 2) ** 2 * (middle + 3)) > std**2
        low, high = (middle, high) if wider else (low, middle)
    return low


def average(theta, std, step):
    """The power-function average of theta[1..step], as an explicit sum."""
    edges = (np.arange(step + 1) / step) ** (gamma(std) + 1.0)
    return np.sum(np.diff(edges) * theta[1 : step + 1])


def stored(count, stds=(0.05, 0.10), end=END):
    return [Snapshot(end * (i + 1) // count, str(std), std) for i in range(count) for std in stds]


@pytest.mark.parametrize(("a", "b"), [((7.0, 16.97), (10.0, 6.94)), ((10.0, 6.94), (10.0, 6.94)), ((9, 0.0), (3, 2.5))])
def test_inner_products_are_the_integrals(a, b):
    (step_a, gamma_a), (step_b, gamma_b) = a, b
    p = lambda tau, step, gamma: (gamma + 1) * tau**gamma / step ** (gamma + 1)
    product = lambda tau: p(tau, step_a, gamma_a) * p(tau, step_b, gamma_b)
    expected, _ = integrate.quad(product, 0.0, min(step_a, step_b), epsabs=1e-13)
    np.testing.assert_allclose(posthoc.inner_product(step_a, gamma_a, step_b, gamma_b), expected, rtol=1e-9)


@pytest.mark.parametrize("which", [5, 14, 31])
def test_a_stored_average_is_itself(which):
    """Weight 1 on it and 0 on the 31 others."""
    table = stored(16)
    weights, error = posthoc.solve(table, table[which].std, table[which].step)
    np.testing.assert_allclose(weights, np.arange(32) == which, atol=1e-9)
    assert error < 1e-6


def trajectories():
    """Parameters over training: a decay to the final value, and sinusoids of one to sixteen periods; f64[5,END+1]."""
    u = np.arange(END + 1) / END
    return np.stack([np.exp(-5.0 * u), *(np.sin(2 * np.pi * k * u + k) for k in (1, 3, 7, 16))])


# The worst error over the trajectories, of amplitude 1, rounded up. 16 snapshots of two widths come within 5e-3 for the
# sinusoid of 16 periods (2e-4 for the slower ones); 64 come within 1e-4.
@pytest.mark.parametrize(
    ("std", "count", "atol"),
    [(0.07, 16, 2e-3), (0.15, 16, 5e-3), (0.07, 64, 3e-6), (0.15, 64, 2e-6), (0.03, 64, 1e-4), (0.2, 64, 1e-4)],
)
def test_an_average_is_made_up_of_two_stored_widths(std, count, atol):
    """Against the explicit sum over all updates, where other widths are off by far more than the tolerance."""
    table = stored(count)
    for theta in trajectories():
        kept = {(s.step, s.profile): {"w": np.float32(average(theta, s.std, s.step))} for s in table}
        got = posthoc.combine(table, std, END, lambda step, profile, kept=kept: kept[step, profile])
        np.testing.assert_allclose(got["w"], average(theta, std, END), atol=atol)
    theta = trajectories()[2]
    assert min(abs(average(theta, other, END) - average(theta, std, END)) for other in (0.05, 0.10)) > 10 * atol


def test_an_average_may_end_before_the_run_does():
    """Only what was stored by then is asked for."""
    rules = {"a": plugs.build("", "power(std=0.05)", RULES), "b": plugs.build("", "power(std=0.10)", RULES)}
    table = posthoc.snapshots(range(0, END + 1, 64), rules, END // 2)
    assert {s.step for s in table} == set(range(64, END // 2 + 1, 64))
    assert [s[1:] for s in table[:2]] == [("a", 0.05), ("b", 0.10)]
    theta = trajectories()[1]
    got = posthoc.combine(table, 0.08, END // 2, lambda step, name: {"w": average(theta, rules[name].std, step)})
    np.testing.assert_allclose(got["w"], average(theta, 0.08, END // 2), atol=2e-3)


def test_two_profiles_of_one_width_do_no_harm():
    weights, error = posthoc.solve(stored(16, stds=(0.05, 0.05, 0.10)), 0.05, END)
    np.testing.assert_allclose(weights[-3:], [0.5, 0.5, 0.0], atol=1e-6)
    assert error < 1e-6


def test_every_average_is_read_once():
    table, read = stored(16), []

    def load(step, profile):
        read.append((step, profile))
        return {"w": np.float32(1.0)}

    got = posthoc.combine(table, 0.08, END, load)
    assert read == [s[:2] for s in table]
    np.testing.assert_allclose(got["w"], 1.0, atol=0.01)


@pytest.mark.parametrize(
    ("table", "std"), [([], 0.05), (stored(2), 0.15), (stored(16), 0.02), (stored(16, stds=(0.05,)), 0.1)]
)
def test_too_few_averages_are_refused(table, std):
    with pytest.raises(UserError, match=rf"posthoc\(std={std}\).*{len(table)} stored averages.*keep_every"):
        posthoc.combine(table, std, END, lambda step, profile: pytest.fail("nothing should be read"))


def test_other_rules_cannot_be_combined():
    rules = {"main": plugs.build("", "warmup(decay=0.999)", RULES)}
    with pytest.raises(UserError, match=r"train.ema = 'main'.*power"):
        posthoc.snapshots([1000], rules, 1000)


def test_from_the_checkpoints_of_a_run(tmp_path):
    """40 updates, every second one kept: the average made up of two widths is the third, which the run kept too."""
    profiles = {"narrow": "power(std=0.08)", "wide": "power(std=0.16)", "truth": "power(std=0.12)"}
    settings = TrainSettings(optimizer="sgd", learning_rate=0.5, clip_norm=0.0, batch_size=4, ema=profiles)
    trainer = Trainer(toys.leader_and_follower(), settings, seed=0)
    state, step = trainer.init(), jax.jit(trainer.step)
    checkpoints = Checkpoints(tmp_path, CheckpointSettings(every=2, keep=1, keep_every=2))
    for n in range(1, 41):
        state, _ = step(state, toys.batch(np.sin(n / 5.0)), {})
        if n % 2 == 0:
            checkpoints.save(state, n, {})
    checkpoints.close()

    reader = Checkpoints(tmp_path)
    rules = {name: trainer.rules[name] for name in ("narrow", "wide")}
    table = posthoc.snapshots(reader.steps(), rules, 40)
    abstract = jax.eval_shape(lambda: state.params)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one), abstract)
    got = posthoc.combine(table, 0.12, 40, lambda step, name: reader.restore_weights(abstract, step, name))
    reader.close()
    truth, narrow = (float(state.ema[name]["leader"]["w"]) for name in ("truth", "narrow"))
    np.testing.assert_allclose(got["leader"]["w"], truth, atol=0.01)
    assert abs(narrow - truth) > 0.1
