"""Time samplings: Kolmogorov-Smirnov tests against the distributions that the papers name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from scipy.special import logit

from diffusion_jax import plugs
from diffusion_jax.diffusion.schedule import first_time
from diffusion_jax.diffusion.time_sampling import QUANTILES, TIME_SAMPLINGS, Importance, independent, stratified
from diffusion_jax.errors import UserError
from tests import schedules


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


KINDS = ("vp_linear", "scaled_linear", "ve", "rectified_flow")
"""A schedule of each kind: what a law makes of a schedule is said by `time` alone, which has its own tests."""


@pytest.mark.parametrize("text", LAWS)
@pytest.mark.parametrize("name", KINDS)
def test_distribution(text, name):
    """p > 0.001 on 4,000 draws: a mean off by 0.1 standard deviations, or a spread off by 10 %, has p < 1e-5."""
    schedule = schedules.build(name)
    t = np.asarray(plugs.build("time", text, TIME_SAMPLINGS)(schedule, quantiles(4000)), np.float64)
    statistic, law = LAWS[text]
    assert stats.kstest(statistic(schedule, t), law(float(first_time(schedule))).cdf).pvalue > 0.001


@pytest.mark.parametrize("name", TIME_SAMPLINGS)
@pytest.mark.parametrize("schedule", schedules.EVERY)
def test_times_stay_where_training_may_look(name, schedule):
    """Also for a law so wide that most of its draws fall outside."""
    schedule = schedules.build(schedule)
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


@pytest.mark.parametrize("text", LAWS)
@pytest.mark.parametrize("name", KINDS)
def test_slope_is_one_over_the_density(text, name, x64):
    """dt/du by `jax.jvp`, which weightings divide the density out with, against finite differences."""
    schedule, u, h = schedules.build(name), jnp.linspace(0.2, 0.9, 23), 1e-7
    time = plugs.build("time", text, TIME_SAMPLINGS)
    t, slope = jax.jvp(lambda u: time(schedule, u), (u,), (jnp.ones_like(u),))
    assert t.dtype == u.dtype
    assert np.all(np.asarray(slope) > 0.0)
    np.testing.assert_allclose(slope, (time(schedule, u + h) - time(schedule, u - h)) / (2 * h), rtol=1e-4)


# ------------------------------------------------------------------------------------------ quantiles


def filled(importance, losses, batch=64):
    """The history after the losses (a function of u) of many batches, drawn as they come."""

    @jax.jit
    def step(history, at):
        number, key = at
        history = importance.begun(history, number)
        u, _ = importance.draw(history, key, jnp.arange(batch))
        return importance.update(history, jnp.arange(batch), u, losses(u)), None

    steps = jnp.arange(40), jax.random.split(jax.random.key(1), 40)
    return importance.begun(jax.lax.scan(step, importance.init(), steps)[0], jnp.int32(40))


@pytest.mark.parametrize("name", QUANTILES)
def test_weighted_quantiles_integrate_without_bias(name):
    """E weight f(u) = int f = e - 1 for f = exp, before and after losses: within 4 standard errors."""
    way = plugs.build("quantiles", name, QUANTILES)
    history = way.init()
    if name == "importance":
        history = filled(way, lambda u: jnp.where(u < 0.3, 5.0, 0.1 + u))
    u, weight = (np.asarray(a, np.float64) for a in way.draw(history, jax.random.key(5), jnp.arange(20000)))
    assert np.all((u >= 0.0) & (u < 1.0))
    values = weight * np.exp(u)
    np.testing.assert_allclose(values.mean(), np.e - 1.0, atol=4 * values.std() / np.sqrt(len(u)))
    np.testing.assert_allclose(weight.mean(), 1.0, atol=4 * weight.std() / np.sqrt(len(u)) + 1e-6)


@pytest.mark.parametrize("name", QUANTILES)
def test_a_way_without_history_leaves_it_alone(name):
    way = plugs.build("quantiles", name, QUANTILES)
    history = way.begun(way.init(), jnp.int32(0))
    u, _ = way.draw(history, jax.random.key(0), jnp.arange(8))
    after = way.update(history, jnp.arange(8), u, jnp.ones(8))
    assert jax.tree.structure(after) == jax.tree.structure(way.init())
    if name != "importance":
        assert after == way.init() == ()


def test_importance_is_uniform_until_every_bin_has_its_losses():
    """Nichol & Dhariwal 2021, section 3.3: "until we draw 10 samples for every t"."""
    importance = Importance(bins=4, memory=3)
    history, centres = importance.init(), (jnp.arange(4.0) + 0.5) / 4
    for step in range(2):
        history = importance.begun(history, jnp.int32(step))
        history = importance.update(history, jnp.arange(4), centres, jnp.array([1.0, 2.0, 3.0, 4.0]))
    np.testing.assert_array_equal(importance.density(history), np.ones(4))
    history = importance.begun(history, jnp.int32(2))
    history = importance.update(history, jnp.arange(3), centres[:3], jnp.array([1.0, 2.0, 3.0]))
    np.testing.assert_array_equal(importance.density(history), np.ones(4))
    history = importance.begun(history, jnp.int32(3))
    history = importance.update(history, jnp.arange(1), centres[3:], jnp.array([4.0]))
    np.testing.assert_allclose(importance.density(history), 0.001 + 0.999 * np.array([0.4, 0.8, 1.2, 1.6]), rtol=1e-6)


def test_importance_follows_the_root_of_the_mean_square():
    """p_b proportional to sqrt(mean L^2), by a histogram of what is drawn; chi^2 with p > 0.001."""
    importance = Importance(bins=10, memory=10, uniform=0.05)
    size = 0.2 + np.linspace(0.0, 1.0, 10) ** 2
    history = filled(importance, lambda u: jnp.asarray(size, jnp.float32)[(u * 10).astype(jnp.int32)])
    expected = 0.05 + 0.95 * size / size.mean()
    np.testing.assert_allclose(importance.density(history), expected, rtol=1e-5)
    u, weight = importance.draw(history, jax.random.key(3), jnp.arange(20000))
    counts = np.histogram(np.asarray(u), bins=10, range=(0.0, 1.0))[0]
    assert stats.chisquare(counts, 2000.0 * expected).pvalue > 0.001
    np.testing.assert_allclose(weight, 1.0 / expected[(np.asarray(u) * 10).astype(int)], rtol=1e-4)


def test_importance_remembers_the_last_losses_of_each_bin():
    """Against lists that are written to one loss after the other; a batch may bring more losses than there is room."""
    importance, generator = Importance(bins=3, memory=4), np.random.default_rng(0)
    history, lists = importance.init(), [[], [], []]
    update = jax.jit(importance.update)
    for step in range(7):
        u, losses = generator.uniform(size=13).astype(np.float32), generator.normal(size=13).astype(np.float32)
        history = importance.begun(history, jnp.int32(step))
        history = update(history, jnp.arange(13), jnp.asarray(u), jnp.asarray(losses))
        for place, loss in zip((u * 3).astype(int), losses, strict=True):
            lists[place].append(loss)
    for b in range(3):
        assert np.asarray(history["losses"])[b].tolist() == [float(loss) for loss in lists[b][: -4 - 1 : -1]]


def test_importance_draws_and_remembers_alike_in_one_batch_and_in_parts():
    """Interleaved parts, the last of them first: the same quantiles, and bit by bit the same memory."""
    importance, index = Importance(bins=5, memory=3), jnp.arange(24)
    losses = lambda u, step: jnp.exp(3.0 * u) + step

    def run(parts):
        history, drawn = importance.init(), []
        for step in range(5):
            drawn.append(np.zeros(24))
            for part in parts:
                history = importance.begun(history, jnp.int32(step))
                u, _ = importance.draw(history, jax.random.key(step), index[part])
                history = importance.update(history, index[part], u, losses(u, jnp.float32(step)))
                drawn[step][part] = u
        return history, drawn

    (whole, drawn), (parts, again) = run([slice(None)]), run([slice(part, None, 4) for part in (3, 1, 0, 2)])
    assert not np.allclose(whole["density"], 1.0)
    np.testing.assert_array_equal(again, drawn)
    jax.tree.map(np.testing.assert_array_equal, parts, whole)


def test_importance_lowers_the_variance():
    """Of the mean loss, for a loss that is 10 times larger in a tenth of the times; its mean stays."""
    importance = Importance(bins=50)
    loss = lambda u: jnp.where(u < 0.1, 10.0, 1.0) * (1.0 + 0.1 * jnp.sin(40.0 * u))
    history = filled(importance, loss)
    u, weight = importance.draw(history, jax.random.key(9), jnp.arange(5000))
    plain, better = np.asarray(loss(jnp.linspace(0.0, 1.0, 5000))), np.asarray(weight * loss(u))
    np.testing.assert_allclose(better.mean(), plain.mean(), rtol=0.01)
    assert better.std() < 0.2 * plain.std()


def test_no_gradient_passes_into_the_history():
    importance = Importance(bins=2)
    u = jnp.array([0.2, 0.7])
    total = lambda scale: jnp.sum(importance.update(importance.init(), jnp.arange(2), u, scale * jnp.ones(2))["losses"])
    assert float(total(2.0)) == 4.0
    assert float(jax.grad(total)(2.0)) == 0.0


@pytest.mark.parametrize("text", ["importance(bins=0)", "importance(memory=0)", "importance(uniform=0.0)"])
def test_impossible_quantiles_are_refused_by_name(text):
    with pytest.raises(UserError, match="importance"):
        plugs.build("family.quantiles", text, QUANTILES)


@pytest.mark.parametrize("text", ["logit_normal(std=0.0)", "log_normal(std=-1.0)"])
def test_impossible_options_are_refused_by_name(text):
    with pytest.raises(UserError, match=text.split("(")[0]):
        plugs.build("family.time_sampling", text, TIME_SAMPLINGS)
