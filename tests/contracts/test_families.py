"""What every family promises to the trainer, the sampler and the evaluation, whichever rows it is put together from.

A new family joins by being registered; `VARIANTS` must then say how to build it small.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import families, rng, tree
from diffusion_jax.diffusion.prediction import PREDICTIONS
from diffusion_jax.diffusion.schedule import SCHEDULES, logsnr
from diffusion_jax.errors import UserError
from diffusion_jax.families import FAMILIES
from diffusion_jax.settings import TrainSettings
from diffusion_jax.training.step import Trainer
from diffusion_jax.types import Context, ImageSpec

LABELLED = ImageSpec(size=8, channels=1, num_classes=3)
PLAIN = ImageSpec(size=8, channels=1, num_classes=0)
DIT = "dit(patch=4,width=16,depth=1,heads=2)"
UNET = "unet(channels=32,multipliers=(1,),blocks=1,attention=())"
R3GAN = "r3gan(channels_base=64,channels_max=8,blocks=1,group=16)"
FLAT = "flat(latents=4,channels=8,multipliers=(1,1))"


def row(name, spec=LABELLED, **fields):
    return {"name": name, **fields}, spec


def diffusion(schedule, prediction, spec=LABELLED, network=DIT, **fields):
    return row("diffusion", spec, network=network, schedule=schedule, prediction=prediction, **fields)


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
            yield f"diffusion-{schedule}-{prediction}", diffusion(schedule, prediction, **fields)


PAIRINGS = dict(_pairings())
"""Every schedule with every prediction that goes with it."""


def _by_default(name):
    """Every schedule with v, every prediction on two schedules; the others with -m slow."""
    return name.endswith("-v") or name.startswith(("diffusion-cosine-", "diffusion-rectified_flow-"))


PAIRS = [pytest.param(name, marks=[] if _by_default(name) else pytest.mark.slow) for name in PAIRINGS]

VARIANTS = {
    "diffusion": diffusion("rectified_flow", "velocity"),
    "diffusion-plain": diffusion(
        "cosine", "v", PLAIN, DIT[:-1] + ",dropout=0.2)", weighting="min_snr", time_sampling="uniform"
    ),
    "diffusion-edm": diffusion("edm", "edm", weighting="edm", time_sampling="log_normal"),
    "diffusion-unet": diffusion("vp_linear", "v", network=UNET),
    "diffusion-learned": diffusion(
        "learned(hidden=8)", "v", weighting="elbo", time_sampling="uniform", quantiles="importance(bins=4,memory=1)"
    ),
    "diffusion-variance": diffusion("cosine", "v", objective="learned_variance(steps=20)", time_sampling="uniform"),
    "diffusion-classifier": diffusion("gvp", "v", classifier=DIT),
    "diffusion-autoguided": diffusion("rectified_flow", "x0", network=DIT.replace("width=16", "width=24")),
    "gan": row("gan", generator=R3GAN, discriminator=R3GAN),
    "gan-plain": row(
        "gan", PLAIN, generator="dcgan(width=8)", discriminator="dcgan(width=8)", loss="non_saturating", regularisers=""
    ),
    "gan-ada": row(
        "gan",
        generator="resnet(width=8,multipliers=(1,))",
        discriminator="resnet(width=8,multipliers=(1,),blocks=0)",
        loss="least_squares",
        regularisers="gradient_penalty",
        spectral_norm="both",
        augmentation="ada(start=0.5,geometry=False,color=False)",
    ),
    "vae": row("vae", network="ladder(channels=8,multipliers=(1,1),levels=(1,1),latents=2)", free_bits=0.5),
    "vae-flat": row("vae", network=FLAT, pixels="gaussian(std=0.5,learned=True)"),
    "vae-plain": row("vae", PLAIN, network=FLAT, pixels="bernoulli", beta=2.0, warmup=2),
}
"""A few of each family, for what costs a compilation."""

WORSE = {"diffusion-autoguided": "diffusion"}
"""Variant under autoguidance -> the variant that is its worse model: another network, another prediction."""

SAMPLING = {
    "diffusion": {
        "solver": ("ddim(eta=0.2)", "ddim(eta=1.0)"),
        "grid": ("uniform", "cosine"),
        "steps": (3, 6),
        "guidance": (1.5, 3.0),
        "rules": ("interval(high=90.0)+rescaled(phi=0.1)", "interval(high=0.7)+rescaled(phi=0.9)"),
        "threshold": ("static", "static(bound=0.3)"),
        "autoguidance": (1.5, 3.0),
        "autoguidance_rules": ("apg(momentum=-0.5)", "apg(momentum=-0.1)"),
        "classifier": (0.0, 2.0),
        "temperature": (1.0, 1.5),
    },
    "gan": {"truncation": ("normal(bound=0.5)", "normal(bound=2.0)")},
    "vae": {"temperature": (1.0, 1.5), "show": ("draw", "mean")},
}
"""family -> options of `sample`, each with two values between which nothing may compile again."""

QUICK = {"diffusion": {"steps": 3}}
"""family -> options with which images take less time than with the default ones."""


pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_every_family_has_its_variants():
    assert {section["name"] for section, _ in VARIANTS.values()} == set(FAMILIES)


@functools.cache
def family(name):
    section, spec = (PAIRINGS | VARIANTS)[name]
    it = families.build(section, spec, "float32")
    return it.guided_by(family(WORSE[name]).denoise) if name in WORSE else it


def batch(spec, count=4, seed=0):
    generator = np.random.default_rng(seed)
    images = {"image": jnp.asarray(generator.uniform(-1, 1, (count, *spec.shape)), jnp.float32)}
    label = {"label": jnp.arange(count, dtype=jnp.int32) % spec.num_classes} if spec.num_classes else {}
    return images | label | {"index": jnp.arange(count, dtype=jnp.int32)}


def keys(count, seed=0):
    return rng.example_keys(rng.stream(jax.random.key(seed), "sample"), jnp.arange(count))


def condition(spec, count, label=None):
    if not spec.num_classes:
        return {}
    return {"label": jnp.arange(count) % spec.num_classes if label is None else jnp.full(count, label)}


class Counted:
    """A compiled function that knows how often it was traced."""

    def __init__(self, function):
        self.traces = 0

        def counting(*args):
            self.traces += 1
            return function(*args)

        self.program = jax.jit(counting)

    def __call__(self, *args):
        return self.program(*args)


@functools.cache
def weights(name):
    """(Parameters drawn at random, so that none is 0, extra): at initialisation many outputs are 0."""
    generator = np.random.default_rng(1)

    def draw(leaf):
        spread = 0.3 if leaf.ndim == 1 else np.prod(leaf.shape[:-1]) ** -0.5
        return jnp.asarray(spread * generator.normal(size=leaf.shape), leaf.dtype)

    params, extra = jax.tree.map(draw, jax.eval_shape(family(name).init, jax.random.key(0)))
    return params | ({"weak": weights(WORSE[name])[0]} if name in WORSE else {}), extra


@functools.cache
def generate(name):
    return Counted(family(name).generate)


@functools.cache
def edit(name, which):
    return jax.jit(family(name).edits[which])


# ------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in WORSE])
def test_training(name):
    """The loss is finite, every parameter moves, and no later step traces again."""
    spec = VARIANTS[name][1]
    trainer = Trainer(family(name), TrainSettings(learning_rate=1e-2, batch_size=4), seed=0)
    step, begin = Counted(trainer.step), jax.jit(trainer.init)()
    state = begin
    for i in range(4):  # gates that start at 0 open in the first step; what stands behind them moves from the second on
        state, metrics = step(state, batch(spec, seed=i), {})
        assert all(np.isfinite(value) for value in metrics.values()), metrics
    assert step.traces == 1
    assert (int(state.step), int(state.skipped["total"])) == (4, 0)
    for old, new in ((begin.params, state.params), *((begin.ema[key], state.ema[key]) for key in begin.ema)):
        for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(old), jax.tree.leaves(new), strict=True):
            assert np.all(np.isfinite(b)), tree.path_name(path)
            assert not np.array_equal(a, b), tree.path_name(path)


@pytest.mark.parametrize("name", PAIRS)
def test_losses_and_gradients_are_finite(name):
    """With parameters at random, of every player; and the loss is one that its parameters can lower."""
    it, spec = family(name), PAIRINGS[name][1]
    params, extra = weights(name)
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


def sample(name, count=4, seed=0, label=None, which=None, **changes):
    spec = (PAIRINGS | VARIANTS)[name][1]
    options = family(name).sampling(QUICK.get(family(name).name, {}) | changes)
    chosen = keys(count, seed)
    wanted = condition(spec, count, label)
    if which is not None:
        chosen, wanted = chosen[which], jax.tree.map(lambda a: a[which], wanted)
    return np.asarray(generate(name)(weights(name)[0], chosen, wanted, options))


@pytest.mark.parametrize("name", VARIANTS)
def test_images(name):
    """f32[n,H,W,C] in [-1, 1], not all of it at the ends; the same twice."""
    images = sample(name)
    assert images.shape == (4, *VARIANTS[name][1].shape)
    assert images.dtype == np.float32
    assert np.abs(images).max() <= 1.0
    assert np.mean(np.abs(images) < 0.99) > 0.02
    np.testing.assert_array_equal(images, sample(name))


@pytest.mark.parametrize("name", VARIANTS)
def test_an_image_depends_on_its_own_key_and_condition(name):
    """Each alone, and all in another order."""
    whole = sample(name)
    order = np.array([1, 2, 0, 3])
    np.testing.assert_allclose(sample(name, which=order), whole[order], atol=1e-5)
    for i in range(4):
        np.testing.assert_allclose(sample(name, which=np.array([i])), whole[i : i + 1], atol=1e-5)
    assert not np.allclose(whole[0], whole[3])  # the same label, another key


def test_noise_on_the_way_belongs_to_the_image_too():
    """A stochastic solver draws from the image's own key at every step."""
    whole = sample("diffusion", solver="ddim(eta=1.0)")
    order = np.array([1, 2, 0, 3])
    np.testing.assert_allclose(sample("diffusion", which=order, solver="ddim(eta=1.0)"), whole[order], atol=1e-5)
    assert not np.allclose(whole, sample("diffusion", solver="ddim"), atol=1e-3)


@pytest.mark.parametrize("name", VARIANTS)
def test_options_seeds_and_labels_do_not_compile_again(name):
    """And all of them matter."""
    spec = VARIANTS[name][1]
    options = SAMPLING[name.split("-")[0]] | {"seed": (0, 1)}
    if spec.num_classes:
        options |= {"label": (0, 1)}
    else:
        options = {key: value for key, value in options.items() if key not in ("guidance", "rules")}
    if "classifier" not in name:
        options.pop("classifier", None)
    if name not in WORSE:
        options = {key: value for key, value in options.items() if not key.startswith("autoguidance")}
    first = sample(name, **{key: values[0] for key, values in options.items()})
    before = generate(name).traces
    for key, values in options.items():
        other = sample(name, **{k: v[0] for k, v in options.items()} | {key: values[1]})
        assert not np.allclose(other, first, atol=1e-4), key
    assert generate(name).traces == before


def test_null_label_is_what_guidance_zero_shows():
    """Guidance 0 is the unconditional model: the label does not matter; at 1 and above it does."""
    one, two = (sample("diffusion", label=label, guidance=0.0) for label in (0, 1))
    np.testing.assert_allclose(one, two, atol=1e-6)


# ------------------------------------------------------------------------------------------ autoguidance


def models(label):
    """The autoguided variant's model and its worse one, alone: (x, t) -> x0."""
    params, _ = weights("diffusion-autoguided")

    def alone(name, params):
        denoise = jax.jit(lambda weights, *point: family(name).denoise(weights)(*point))
        return lambda x, t: denoise(params, x, jnp.float32(t), label).x0

    return alone("diffusion-autoguided", params), alone(WORSE["diffusion-autoguided"], params["weak"])


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
        "autoguidance": 1.4,
        "autoguidance_rules": f"apg(eta=1.0,momentum={momentum})",
    }
    params, image = weights("diffusion-autoguided")[0], batch(LABELLED)["image"]
    expected = walked(jnp.zeros_like(image), [1.0, 0.75, 0.5, 0.25, 0.0], 1.4, momentum, label)
    np.testing.assert_allclose(sample("diffusion-autoguided", **options), expected, atol=1e-4)
    assert np.mean(np.abs(expected) < 1.0) > 0.1
    inputs = {"image": image, "label": label, "strength": jnp.float32(0.5)}
    expected = walked(0.5 * image, [0.5, 0.25, 0.0], 1.4, momentum, label)
    edited = edit("diffusion-autoguided", "img2img")(params, keys(4), inputs, it.sampling(options))
    np.testing.assert_allclose(edited, expected, atol=1e-4)
    assert np.mean(np.abs(expected) < 1.0) > 0.1


def test_each_guidance_has_its_own_rules():
    """An interval that covers nothing closes the guidance that it is a rule of, and no other."""
    shut, wide = "interval(low=1.0,high=1.0)", "interval"

    def made(guidance, autoguidance, rules=wide, autoguidance_rules=wide):
        weights = {"guidance": guidance, "autoguidance": autoguidance}
        return sample("diffusion-autoguided", rules=rules, autoguidance_rules=autoguidance_rules, **weights)

    np.testing.assert_array_equal(made(3.0, 2.0, rules=shut), made(1.0, 2.0))
    np.testing.assert_array_equal(made(3.0, 2.0, autoguidance_rules=shut), made(3.0, 1.0))
    several = [made(3.0, 2.0), made(1.0, 2.0), made(3.0, 1.0)]
    assert all(not np.allclose(a, b, atol=1e-3) for a, b in itertools.combinations(several, 2))


# ------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("name", "section", "says"),
    [
        ("diffusion", {"stepz": 3}, "stepz"),
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
    section, spec = diffusion("rectified_flow", "velocity", label_dropout=0.0)
    with pytest.raises(UserError, match=r"sample.guidance = 3.0"):
        families.build(section, spec, "float32").sampling({"guidance": 3.0})


@pytest.mark.parametrize("section", [{"name": "difusion"}, {"name": "diffusion", "netwrk": "dit"}, {}])
def test_unknown_families_and_fields_are_refused(section):
    with pytest.raises(UserError, match=r"family.*(diffusion|netwrk)"):
        families.build(section, LABELLED, "float32")


@pytest.mark.parametrize("grid", ["karras", "logsnr_uniform"])
def test_a_learned_schedule_is_walked_in_its_own_log_snr(grid):
    """Whatever was learned, the stops have the grid's log-SNRs; a grid of times keeps its times."""
    it = family("diffusion-learned")
    params, _ = weights("diffusion-learned")
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
    section, spec = diffusion(schedule, prediction, **fields)
    with pytest.raises(UserError, match=says):
        families.build(section, spec, "float32")


# ------------------------------------------------------------------------------------------ does it learn?

USUAL = {
    "edm": {"prediction": "edm", "weighting": "edm", "time_sampling": "log_normal"},
    "ve": {"prediction": "edm", "weighting": "edm", "time_sampling": "log_normal"},
    "rectified_flow": {"prediction": "velocity", "time_sampling": "logit_normal"},
}
"""The rows that the schedule's paper puts beside it; v and uniform times where nothing is said."""


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_image_is_learned_and_drawn(schedule):
    """200 steps on one image: then every key draws it. A model that learned nothing is off by 0.5 and more.

    By DDIM, which is exact on a single point on every schedule: what is off is the network.
    """
    rows = {"prediction": "v", "time_sampling": "uniform"} | USUAL.get(schedule, {})
    section, spec = diffusion(schedule, spec=PLAIN, network="dit(patch=2,width=32,depth=1,heads=2)", **rows)
    it = families.build(section, spec, "float32")
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
