"""The diffusion family: every schedule with every prediction, guidance and autoguidance, what is refused, learning."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import rng
from diffusion_jax.diffusion.prediction import PREDICTIONS
from diffusion_jax.diffusion.schedule import SCHEDULES, logsnr
from diffusion_jax.errors import UserError
from diffusion_jax.settings import TrainSettings
from diffusion_jax.training.step import Trainer
from diffusion_jax.types import Context
from tests.arrays import filled
from tests.contracts.families import LABELLED, PLAIN, VARIANTS, batch, diffusion, drawn, family, weights

pytestmark = pytest.mark.usefixtures("quick_compilation")


def keys(count):
    return rng.sample_keys(jnp.uint32(0), jnp.arange(count))


# ------------------------------------------------------------------------------------------ pairings

EVERY = ("learned(hidden=8)", *SCHEDULES)
LEARNED = {"weighting": "elbo", "time_sampling": "uniform"}
"""The rows without which a learned schedule is refused."""
ILL_POSED = tuple(
    itertools.product(("gvp", "rectified_flow", "resolution_shifted", "zero_terminal_snr"), ("eps", "score"))
)
"""Schedules that end in alpha = 0, where noise says nothing of the image."""


def _pairings():
    for schedule, prediction in itertools.product(EVERY, PREDICTIONS):
        if (schedule, prediction) not in ILL_POSED:
            fields = LEARNED if schedule.startswith("learned") else {}
            yield f"{schedule}-{prediction}", diffusion(schedule, prediction, **fields)


PAIRINGS = dict(_pairings())
"""Every schedule with every prediction that goes with it."""


def _by_default(name):
    """Five schedules of as many sorts with v, every prediction on one of them; the others with -m slow."""
    sorts = ("learned", "ve-", "vp_linear-", "zero_terminal_snr-")
    return name.startswith("rectified_flow-") or (name.endswith("-v") and name.startswith(sorts))


PAIRS = [pytest.param(name, marks=[] if _by_default(name) else pytest.mark.slow) for name in PAIRINGS]


@pytest.mark.parametrize("name", PAIRS)
def test_losses_and_gradients_are_finite(name):
    """With parameters at random, of every player; and the loss is one that its parameters can lower."""
    it, spec = PAIRINGS[name].build(), PAIRINGS[name].spec
    params, extra = jax.tree.map(jnp.asarray, filled(it.init))
    ctx = Context(
        batch=batch(spec),
        key=jax.random.key(0),
        common=jax.random.key(1),
        step=jnp.int32(0),
        extra=extra,
        ema={"main": params},
        frozen={},
    )
    for player in it.players:
        own = lambda mine, player=player: player.loss(params | {player.name: mine}, ctx)
        (loss, _), gradient = jax.jit(jax.value_and_grad(own, has_aux=True))(params[player.name])
        assert np.isfinite(loss)
        leaves = jax.tree.leaves(gradient)
        assert all(np.all(np.isfinite(leaf)) for leaf in leaves)
        assert max(np.abs(leaf).max() for leaf in leaves) > 0.0


# ------------------------------------------------------------------------------------------ sampling


def test_noise_on_the_way_belongs_to_the_image_too():
    """A stochastic solver draws from the image's own key at every step."""
    whole = drawn("diffusion", solver="ddim(eta=1.0)")
    order = [1, 2, 0, 3]
    np.testing.assert_allclose(drawn("diffusion", index=order, solver="ddim(eta=1.0)"), whole[order], atol=1e-5)
    assert not np.allclose(whole, drawn("diffusion", solver="ddim"), atol=1e-3)


def test_null_label_is_what_guidance_zero_shows():
    """Guidance 0 is the unconditional model: the label does not matter; at 1 and above it does."""
    one, two = (drawn("diffusion", label=label, guidance=0.0, rules="") for label in (0, 1))
    np.testing.assert_allclose(one, two, atol=1e-6)


# ------------------------------------------------------------------------------------------ autoguidance


def models(label):
    """The autoguided variant's model and its worse one, alone: (x, t) -> x0."""
    params = weights("diffusion-autoguided")

    def alone(name, params):
        denoise = jax.jit(lambda weights, *point: family(name).denoise(weights)(*point))
        return lambda x, t: denoise(params, x, jnp.float32(t), label).x0

    return alone("diffusion-autoguided", params), alone(VARIANTS["diffusion-autoguided"].worse, params["weak"])


@functools.cache
def img2img():
    return jax.jit(family("diffusion-autoguided").edits["img2img"])


def walked(x, times, weight, momentum, label):
    """DDIM on rectified flow, x = (1 - t) x0 + t eps, under APG without norm and with its parallel part (eta = 1).

    Sadat et al. 2024, algorithm 1: the model and weight - 1 times a sum of differences, which momentum carries on.
    """
    strong, weak = models(label)
    total = 0.0
    for t, s in itertools.pairwise(times):
        x0 = strong(x, t)
        total = x0 - weak(x, t) + momentum * total
        x0 = x0 + (weight - 1.0) * total
        eps = (x - (1.0 - t) * x0) / t
        x = (1.0 - s) * x0 + s * eps
    return np.clip(x, -1.0, 1.0)


@pytest.mark.parametrize("momentum", [0.0, -0.5, 0.6])
def test_autoguidance_pushes_away_from_the_worse_model_in_samples_and_edits(momentum):
    """By hand, from the two models alone: from a start at 0, and from half an image; hardly any noise is added."""
    it, label = family("diffusion-autoguided"), jnp.int32([0, 1, 2, 0])
    options = {
        "solver": "ddim",
        "steps": 4,
        "threshold": "none",
        "temperature": 1e-8,
        "guidance": 1.0,
        "rules": "",
        "autoguidance": 1.4,
        "autoguidance_rules": f"apg(eta=1.0,momentum={momentum})",
    }
    params, image = weights("diffusion-autoguided"), batch(LABELLED)["image"]
    expected = walked(jnp.zeros_like(image), [1.0, 0.75, 0.5, 0.25, 0.0], 1.4, momentum, label)
    np.testing.assert_allclose(drawn("diffusion-autoguided", **options), expected, atol=1e-4)
    assert np.mean(np.abs(expected) < 1.0) > 0.1
    inputs = {"image": image, "label": label, "strength": jnp.float32(0.5)}
    expected = walked(0.5 * image, [0.5, 0.25, 0.0], 1.4, momentum, label)
    edited = img2img()(params, keys(4), inputs, it.sampling(options))
    np.testing.assert_allclose(edited, expected, atol=1e-4)
    assert np.mean(np.abs(expected) < 1.0) > 0.1


def test_each_guidance_has_its_own_rules():
    """An interval that covers nothing closes the guidance that it is a rule of, and no other."""
    shut, wide = "interval(low=1.0,high=1.0)", "interval"

    def made(guidance, autoguidance, rules=wide, autoguidance_rules=wide):
        weights = {"guidance": guidance, "autoguidance": autoguidance}
        return drawn("diffusion-autoguided", rules=rules, autoguidance_rules=autoguidance_rules, **weights)

    np.testing.assert_array_equal(made(3.0, 2.0, rules=shut), made(1.0, 2.0))
    np.testing.assert_array_equal(made(3.0, 2.0, autoguidance_rules=shut), made(3.0, 1.0))
    several = [made(3.0, 2.0), made(1.0, 2.0), made(3.0, 1.0)]
    assert all(not np.allclose(a, b, atol=1e-3) for a, b in itertools.combinations(several, 2))


# ------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("name", "section", "says"),
    [
        ("diffusion", {"steps": 0}, "sample.steps = 0"),
        ("diffusion", {"steps": 1001}, "sample.steps = 1001"),
        ("diffusion", {"steps": 2.5}, "sample.steps"),
        ("diffusion", {"guidance": -1.0}, "sample.guidance = -1"),
        ("diffusion", {"solver": "hein"}, "did you mean 'heun'"),
        ("diffusion", {"solver": "ddim(eta=2.0)"}, "eta"),
        ("diffusion", {"grid": "karas"}, "did you mean 'karras'"),
        ("diffusion", {"grid": "custom(times=(1.0,0.5))", "steps": 3}, "sample.steps = 3.*2 steps"),
        ("diffusion", {"grid": "discrete(of=100)", "steps": 101}, "sample.steps = 101.*100 stops"),
        ("diffusion", {"rules": "cfg_pp", "solver": "heun"}, "sample.rules = 'cfg_pp'.*ddim"),
        ("diffusion", {"rules": "interval(low=2.0,high=1.0)"}, "low <= high"),
        ("diffusion", {"classifier": 1.0}, "sample.classifier = 1.0"),
        ("diffusion", {"autoguidance": 2.0}, "autoguidance"),
        ("diffusion-autoguided", {"autoguidance": -1.0}, "sample.autoguidance = -1"),
        ("diffusion-autoguided", {"autoguidance_rules": "apgg"}, "sample.autoguidance_rules.*did you mean 'apg'"),
        ("diffusion", {"temperature": 0.0}, "sample.temperature = 0.0"),
        ("diffusion", {"threshold": "dynamical"}, "did you mean 'dynamic'"),
        ("diffusion-plain", {"guidance": 2.0}, "sample.guidance = 2.0"),
        ("diffusion-plain", {"rules": "rescaled"}, "sample.rules = 'rescaled'"),
    ],
)
def test_impossible_options_are_refused_by_name(name, section, says):
    with pytest.raises(UserError, match=says):
        family(name).sampling(section)


def test_guidance_without_hidden_labels_is_refused():
    it = diffusion("rectified_flow", "velocity", label_dropout=0.0).build()
    with pytest.raises(UserError, match=r"sample.guidance = 3.0"):
        it.sampling({"guidance": 3.0})


@pytest.mark.parametrize("grid", ["karras", "logsnr_uniform"])
def test_a_learned_schedule_is_walked_in_its_own_log_snr(grid):
    """Whatever was learned, the stops have the grid's log-SNRs; a grid of times keeps its times."""
    it = family("diffusion-learned")
    params = weights("diffusion-learned")
    model = it.edits["img2img"].args[0]
    schedule = model.prediction(params).schedule
    options = it.sampling({"grid": grid, "steps": 6})
    stops = model.times(schedule, options)
    np.testing.assert_allclose(
        logsnr(schedule, stops[:6]), logsnr(model.begun, options.times[:6]), rtol=1e-3, atol=1e-2
    )
    assert np.abs(np.asarray(stops - options.times)[1:6]).max() > 1e-3
    assert not np.any(stops[6:])
    plain = it.sampling({"grid": "cosine", "steps": 6})
    np.testing.assert_array_equal(model.times(schedule, plain), plain.times)


@pytest.mark.parametrize(
    ("schedule", "prediction", "fields", "says"),
    [
        *((s, p, {}, rf"family.prediction = '{p} with {s}'.*do not determine the image") for s, p in ILL_POSED),
        ("learned", "v", {"time_sampling": "uniform"}, r"family.weighting = 'simple'.*elbo"),
        ("learned", "v", {"weighting": "elbo"}, r"family.time_sampling = 'logit_normal'.*uniform"),
        ("cosine", "v", {"objective": "learned_variance"}, r"family.time_sampling = 'logit_normal'.*uniform"),
        ("shifted(of='cosin')", "v", {}, "did you mean 'cosine'"),
        ("shifted(of='learned')", "v", LEARNED, "a learned schedule is not wrapped"),
    ],
)
def test_ill_posed_pairings_are_refused_by_name(schedule, prediction, fields, says):
    with pytest.raises(UserError, match=says):
        diffusion(schedule, prediction, **fields).build()


# ------------------------------------------------------------------------------------------ does it learn?

USUAL = {
    "edm": {"prediction": "edm", "weighting": "edm", "time_sampling": "log_normal"},
    "ve": {"prediction": "edm", "weighting": "edm", "time_sampling": "log_normal"},
    "rectified_flow": {"prediction": "velocity", "time_sampling": "logit_normal"},
}
"""The rows that the schedule's paper puts beside it; v and uniform times where nothing is said."""


@pytest.mark.parametrize(
    "schedule", [pytest.param(name, marks=[] if name in USUAL else pytest.mark.slow) for name in SCHEDULES]
)
def test_one_image_is_learned_and_drawn(schedule):
    """200 steps on one image: then every key draws it. A model that learned nothing is off by 0.5 and more.

    By DDIM, which is exact on a single point on every schedule: what is off is the network.
    """
    rows = {"prediction": "v", "time_sampling": "uniform"} | USUAL.get(schedule, {})
    it = diffusion(schedule, spec=PLAIN, network="dit(patch=2,width=32,depth=1,heads=2)", **rows).build()
    settings = TrainSettings(
        steps=200, learning_rate=1e-2, learning_rate_schedule="cosine_decay_schedule", batch_size=16, ema={}
    )
    trainer = Trainer(it, settings, seed=0)
    u = jnp.linspace(-0.8, 0.8, 8)
    image = (u[:, None] * jnp.sign(u)[None]).reshape(1, 8, 8, 1)
    data = {"image": jnp.tile(image, (16, 1, 1, 1)), "index": jnp.arange(16, dtype=jnp.int32)}

    @jax.jit
    def learn():
        return jax.lax.scan(lambda state, _: (trainer.step(state, data, {})[0], None), trainer.init(), length=200)[0]

    learned = learn().params
    draw = jax.jit(it.generate)
    images = np.asarray(draw(learned, keys(8), {}, it.sampling({"steps": 20, "solver": "ddim"})))
    off = np.abs(images - np.asarray(image)).mean()
    assert off < 0.06, off
