"""Time samplings: Kolmogorov-Smirnov tests against the distributions that the papers name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from scipy.special import logit

from diffusion_jax import plugs
from diffusion_jax.diffusion.schedule import SCHEDULES, first_time
from diffusion_jax.diffusion.time_sampling import TIME_SAMPLINGS, independent, stratified
from diffusion_jax.errors import UserError


def log_ratio(schedule, t):
    with jax.enable_x64(True):
        t = jnp.asarray(np.asarray(t, np.float64))
        return np.log(schedule.sigma(t)) - np.log(schedule.alpha(t))


LAWS = {
    # Ho et al. 2020, algorithm 1
    "uniform": (lambda schedule, t: t, lambda first: stats.uniform(first, 1.0 - first)),
    # Esser et al. 2024, section 3.1
    "logit_normal": (lambda schedule, t: logit(t), lambda first: stats.norm(0.0, 1.0)),
    "logit_normal(mean=0.5,std=0.6)": (lambda schedule, t: logit(t), lambda first: stats.norm(0.5, 0.6)),
    # Karras et al. 2022, Table 1: ln(sigma) ~ N(-1.2, 1.2^2)
    "log_normal": (log_ratio, lambda first: stats.norm(-1.2, 1.2)),
    "log_normal(mean=-0.4,std=1.0)": (log_ratio, lambda first: stats.norm(-0.4, 1.0)),
}
"""text -> (what of t has the law, the law given the first time)."""


def quantiles(count, seed=0):
    return independent(jax.random.key(seed), jnp.arange(count))


def test_every_time_sampling_has_its_law_here():
    assert set(TIME_SAMPLINGS) <= {text.split("(")[0] for text in LAWS}


@pytest.mark.parametrize("text", LAWS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_distribution(text, name):
    """p > 0.001 on 4,000 draws: a mean off by 0.1 standard deviations, or a spread off by 10 %, has p < 1e-5."""
    schedule = plugs.build("schedule", name, SCHEDULES)
    t = np.asarray(plugs.build("time", text, TIME_SAMPLINGS)(schedule, quantiles(4000)), np.float64)
    statistic, law = LAWS[text]
    assert stats.kstest(statistic(schedule, t), law(float(first_time(schedule))).cdf).pvalue > 0.001


@pytest.mark.parametrize("name", TIME_SAMPLINGS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_times_stay_where_training_may_look(name, schedule):
    """Also for a law so wide that most of its draws fall outside."""
    schedule = plugs.build("schedule", schedule, SCHEDULES)
    text = name if name == "uniform" else f"{name}(std=50.0)"
    if "std" not in plugs.inspect.signature(TIME_SAMPLINGS[name]).parameters:
        text = name
    t = np.asarray(plugs.build("time", text, TIME_SAMPLINGS)(schedule, quantiles(500)))
    assert t.shape == (500,)
    assert t.min() >= float(first_time(schedule))
    assert t.max() <= 1.0


@pytest.mark.parametrize("draw", [independent, stratified])
def test_a_quantile_depends_on_its_own_place_alone(draw):
    key, index = jax.random.key(3), jnp.arange(16)
    together = np.asarray(draw(key, index))
    np.testing.assert_array_equal(draw(key, index[3:5]), together[3:5])
    np.testing.assert_array_equal(draw(key, index[::-1]), together[::-1])
    assert len(set(together.tolist())) == 16


def test_stratified_quantiles_are_uniform_one_by_one():
    """Over many steps the quantile of one place is uniform: no time is preferred."""
    keys = jax.vmap(jax.random.key)(jnp.arange(2000))
    one = jax.vmap(lambda key: stratified(key, jnp.array([11]))[0])(keys)
    assert stats.kstest(np.asarray(one), "uniform").pvalue > 0.001


@pytest.mark.parametrize("count", [8, 64, 100, 1000])
@pytest.mark.parametrize("first", [0, 64])
def test_stratified_quantiles_lie_evenly_together(count, first):
    """Three-distance theorem (Swierczkowski 1958): the gaps between n multiples of the golden section are at most
    1 / (golden n) wide; n independent draws leave a gap of about ln(n) / n."""
    u = np.sort(np.asarray(stratified(jax.random.key(0), first + jnp.arange(count)), np.float64))
    gaps = np.diff(np.append(u, u[0] + 1.0))
    assert gaps.max() < 1.0 / (0.618 * count) + 1e-5
    assert gaps.min() > 0.3 / count


@pytest.mark.parametrize("text", ["logit_normal(std=0.0)", "log_normal(std=-1.0)"])
def test_impossible_options_are_refused_by_name(text):
    with pytest.raises(UserError, match=text.split("(")[0]):
        plugs.build("family.time_sampling", text, TIME_SAMPLINGS)
