"""MAR: what is hidden, what a place is told, and samples of distributions whose denoiser is known in closed form."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from diffusion_jax import families, rng
from diffusion_jax.errors import UserError
from diffusion_jax.evaluation import cost
from diffusion_jax.families import transformer
from diffusion_jax.families.transformer_draws import Shown
from diffusion_jax.families.transformer_mar import MAR
from diffusion_jax.networks.flops import multiply_adds_of
from diffusion_jax.networks.sequence import Places
from diffusion_jax.settings import TrainSettings
from diffusion_jax.training.step import Trainer
from diffusion_jax.types import ImageSpec, TokenSpec
from tests.arrays import filled, normals

pytestmark = pytest.mark.usefixtures("quick_compilation")

SPEC = ImageSpec(size=8, channels=1, num_classes=2, levels=5)
NETWORK = "mar(width=16,depth=1,heads=2,buffer=2,mlp_width=16,mlp_depth=1)"
QUICK = {"solver": "ddim", "steps": 3, "solver_steps": 3}


@functools.cache
def family(spec=SPEC, **fields):
    section = {"name": "transformer", "network": NETWORK, "decoding": "mar", "tokenizer": "patches", **fields}
    return families.build(section, spec, "float32")


def model():
    """What is behind the family's functions."""
    return family().generate.__self__


@functools.cache
def weights():
    return filled(lambda key: family().init(key)[0])


def keys(count, seed=0):
    return rng.example_keys(jax.random.key(seed), jnp.arange(count))


# ------------------------------------------------------------------------------------------ known denoisers


def known(encode, x0_of, side=4, channels=1, **fields):
    """A MAR whose network is two functions in closed form.

    Args:
      encode: (latents f32[n,T,channels], known bool[n,T,1], label) -> z.
      x0_of: (x, alpha, sigma, z) -> E[x0 | x].
      side: of the grid.
      channels: of the latents.
      fields: options of the decoding.
    """

    def denoise(params, x, time, z):
        alpha, sigma = (f(time)[..., None] for f in (it.predicted.schedule.alpha, it.predicted.schedule.sigma))
        eps = (x - alpha * x0_of(x, alpha, sigma, z)) / sigma
        return jnp.concatenate([eps, jnp.full_like(eps, -1.0)], axis=-1)  # of the variances the least

    network = Places(
        init=None,
        apply=None,
        example=(),
        encode=lambda params, latents, masked, label, keys=None: encode(latents, ~masked[..., None], label),
        denoise=denoise,
    )
    tokens = TokenSpec(grid=(side, side, 1), vocabulary=0, channels=channels, num_classes=2)
    it = MAR(network=network, tokens=tokens, schedule="cosine", prediction="eps", **fields)
    return it


def options(it, guidance=1.0, temperature=1.0, **given):
    given = {"guidance_schedule": "", "steps": 1, "solver": "ddim", "grid": "", "solver_steps": 50} | given
    return it.options(guidance=jnp.float32(guidance), temperature=jnp.float32(temperature), **given)


def drawn(it, count, shown=None, **given):
    """Latents f[count,T,channels]."""
    run = jax.jit(lambda options: it.generate({}, keys(count), shown or Shown(label=None), options))
    return np.asarray(run(options(it, **given)), np.float64)


MEANS = np.linspace(-1.5, 1.5, 16).reshape(16, 1)
STDS = np.linspace(0.2, 1.2, 16).reshape(16, 1)


def gaussian():
    """A Gaussian in each place, of its own mean and deviation, which only z says."""
    z = jnp.asarray(np.concatenate([MEANS, STDS], axis=1), jnp.float32)[None]

    def x0_of(x, alpha, sigma, z):
        mean, std = z[..., :1], z[..., 1:]
        return mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (x - alpha * mean)

    return known(lambda latents, shown, label: jnp.broadcast_to(z, (len(latents), 16, 2)), x0_of)


@pytest.mark.parametrize("solver", ["ddim", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ddpm", "heun"))])
def test_samples_have_the_mean_and_the_covariance_of_the_places(solver):
    """4,000 images in 4 steps: means and deviations to 4 standard errors and 2 %, and no place knows of another."""
    x = drawn(gaussian(), 4000, solver=solver, steps=4, solver_steps=50 if solver == "heun" else 500)[..., 0]
    np.testing.assert_allclose(x.mean(0), MEANS[:, 0], atol=4.0 * 1.2 / np.sqrt(4000))
    np.testing.assert_allclose(x.std(0), STDS[:, 0], rtol=0.02 + 4.0 / np.sqrt(2 * 4000))
    assert np.abs(np.corrcoef(x.T) - np.eye(16)).max() < 5.0 / np.sqrt(4000)


@pytest.mark.parametrize("solver", ["ddim", "ddpm"])
def test_temperature_multiplies_the_noise(solver):
    """Of a Gaussian the walk is linear in its noise: x - mean is as many times as large. 0 is the mean, nearly."""
    plain = drawn(gaussian(), 20, solver=solver) - MEANS
    for tau in (0.5, 1.5):
        np.testing.assert_allclose(
            drawn(gaussian(), 20, solver=solver, temperature=tau) - MEANS, tau * plain, atol=2e-3
        )
    np.testing.assert_allclose(drawn(gaussian(), 20, solver=solver, temperature=0.0) - MEANS, 0.0, atol=2e-3)


def test_guidance_moves_a_gaussian_s_mean():
    """With one deviation for all labels, weight w leads to m_none + w (m_label - m_none), and the grown one to less."""

    def x0_of(x, alpha, sigma, z):
        return z + alpha * 0.25 / (alpha**2 * 0.25 + sigma**2) * (x - alpha * z)

    means = jnp.float32([0.5, -0.2, 0.1])  # of labels 0 and 1, and of none
    it = known(lambda latents, shown, label: jnp.broadcast_to(means[label][:, None, None], latents.shape), x0_of)
    label = jnp.arange(2000, dtype=jnp.int32) % 2
    both = Shown.both(label, 2, jnp.float32(3.0))
    x = drawn(it, 2000, both, guidance_schedule="constant")
    for k, expected in enumerate((0.1 + 3.0 * 0.4, 0.1 - 3.0 * 0.3)):
        assert x[k::2].mean() == pytest.approx(expected, abs=4.0 * 0.5 / np.sqrt(16_000) + 0.005)
    weight = 1.0 + 2.0 * (1.0 - np.arange(16) / 16)  # of the place that is drawn when so many are left behind it
    x = drawn(it, 2000, both, guidance_schedule="linear", steps=16, solver_steps=20)
    assert x[0::2].mean() == pytest.approx(np.mean(0.1 + weight * 0.4), abs=4.0 * 0.5 / np.sqrt(16_000) + 0.01)


def signs():
    """Every place is c + 0.2 eps with the image's own c = -1 or 1: from the first place on, all others are known."""

    def encode(latents, shown, label):
        votes = jnp.sum(jnp.where(shown, latents, 0.0), axis=1, keepdims=True)
        return jnp.broadcast_to(25.0 * jnp.sign(votes), latents.shape)  # log odds of c = 1

    def x0_of(x, alpha, sigma, z):
        variance = alpha**2 * 0.04 + sigma**2
        p = jax.nn.sigmoid(z + 2.0 * alpha * x / variance)
        at = lambda c: c + alpha * 0.04 / variance * (x - alpha * c)
        return p * at(1.0) + (1.0 - p) * at(-1.0)

    return known(encode, x0_of)


def test_what_was_drawn_before_is_known_afterwards():
    """A step a place gives the joint distribution; all places at once give that of each place alone."""
    count = 1000
    x = drawn(signs(), count, steps=16, solver="heun")[..., 0]
    c = np.sign(x)
    np.testing.assert_array_equal(c, np.repeat(c[:, :1], 16, axis=1))
    assert np.abs(c[:, 0].mean()) < 4.0 / np.sqrt(count)
    assert (x - c).std() == pytest.approx(0.2, rel=0.03)
    alone = np.sign(drawn(signs(), count)[..., 0])
    assert np.abs(np.corrcoef(alone.T) - np.eye(16)).max() < 5.0 / np.sqrt(count)


# ------------------------------------------------------------------------------------------ the order


def published(steps, length):
    """Masked places after each step, as LTH14/mar has them: the cosine's, always at least one fewer, at last none."""
    left = [length]
    for s in range(1, steps):
        left.append(max(1, min(left[-1] - 1, int(np.floor(length * np.cos(np.pi * s / (2 * steps)))))))
    return [*left[1:], 0]


@pytest.mark.parametrize(("steps", "side"), [(8, 16), (64, 16), (16, 4), (5, 4), (1, 4)])
def test_as_many_places_stay_masked_as_published(steps, side):
    """Observed: the loop, stopped after each step; and latents that stand stay what they are."""
    it = known(lambda latents, shown, label: latents, lambda x, alpha, sigma, z: x, side=side)
    given = options(it, steps=steps, solver_steps=1)
    run = jax.jit(lambda options: it.generate({}, keys(2), Shown(label=None), options))
    before = np.zeros((2, side * side, 1))
    for s, count in enumerate(published(steps, side * side)[:12]):
        made = np.asarray(run(replace(given, steps=jnp.int32(s + 1))))
        np.testing.assert_array_equal((made == 0.0).sum((1, 2)), [count, count])
        np.testing.assert_array_equal(made[before != 0.0], before[before != 0.0])
        before = made
    if (steps, side) == (8, 16):
        assert published(8, 256) == [251, 236, 212, 181, 142, 97, 49, 0]  # as of MaskGIT


def test_every_place_may_come_first():
    it = known(lambda latents, shown, label: latents, lambda x, alpha, sigma, z: x)
    given = replace(options(it, steps=16, solver_steps=1), steps=jnp.int32(1))
    run = jax.jit(lambda keys: it.generate({}, keys, Shown(label=None), given))
    first = np.asarray(run(keys(4000)))[..., 0] != 0.0
    np.testing.assert_allclose(first.mean(0), 1 / 16, atol=4.0 * np.sqrt(1 / 16 / 4000))


# ------------------------------------------------------------------------------------------ training


def test_a_truncated_normal_s_share_is_hidden_in_training():
    """Of 16 places ceil(16 share), share ~ N(1, 0.25^2) within [0.7, 1]: its distribution, every place alike."""
    count = 40_000
    hidden = np.asarray(jax.jit(model().decoding.hidden)(keys(count)))
    law = stats.truncnorm((0.7 - 1.0) / 0.25, 0.0, loc=1.0, scale=0.25)
    expected = np.diff(law.cdf(np.arange(17) / 16), prepend=0.0)
    found = np.bincount(hidden.sum(1), minlength=17) / count
    np.testing.assert_allclose(found, expected, atol=4.0 * np.sqrt(0.25 / count))
    np.testing.assert_allclose(hidden.mean(0), hidden.mean(), atol=4.0 * np.sqrt(0.25 / count))


def test_the_loss_of_a_known_denoiser():
    """E |eps - eps_hat|^2 of a Gaussian is a^2 s^2 / (a^2 s^2 + sigma^2): each place of each image has its own z."""
    it = replace(gaussian(), objective="learned_variance(vlb_weight=0.0)", repeats=3)
    x = jnp.asarray(MEANS + STDS * np.random.default_rng(0).normal(size=(4000, 16, 1)), jnp.float32)
    own = normals(4000, 1, 1)
    x, z = x + own, it.network.encode({}, x, jnp.zeros((4000, 16), bool), None).at[..., :1].add(own)
    losses = np.asarray(jax.jit(lambda x, z: it.place_losses({}, x, z, keys(4000)))(x, z), np.float64)
    t = np.arange(1, 1001) / 1000
    schedule = it.predicted.schedule
    alpha, sigma = (np.asarray(f(jnp.asarray(t, jnp.float32)), np.float64) for f in (schedule.alpha, schedule.sigma))
    expected = (alpha**2 * STDS**2 / (alpha**2 * STDS**2 + sigma**2)).mean(1)
    np.testing.assert_allclose(losses.mean(0), expected, atol=4.0 * losses.std(0).max() / np.sqrt(4000))


def test_hidden_places_alone_count_in_the_loss_and_are_not_seen():
    """By NumPy: the mean over them. With what stands there changed, z is the same, to the bit."""
    it, params = model().decoding, weights()["transformer"]
    latents, label = normals(6, 16, 4), jnp.zeros(6, jnp.int32)
    hidden = np.asarray(it.hidden(rng.fold(keys(6), 0)))
    z = [
        jax.jit(it.network.encode)(params, jnp.where(hidden[..., None], x, latents), hidden, label)
        for x in (latents, 3.0 * normals(6, 16, 4, seed=1))
    ]
    np.testing.assert_array_equal(*z)
    places = np.asarray(jax.jit(it.place_losses)(params, latents, z[0], rng.fold(keys(6), 1)), np.float64)
    losses, _ = jax.jit(lambda params: it.losses(params, latents, label, keys(6), None, 0.0))(params)
    np.testing.assert_allclose(losses, (places * hidden).sum(1) / hidden.sum(1), rtol=1e-5)


def two(count, seed):
    """Images of 4x4 pixels: half of them -0.5 + 0.1 eps, half 0.5 + 0.1 eps."""
    generator = np.random.default_rng(seed)
    c = generator.choice([-0.5, 0.5], size=(count, 1, 1, 1))
    return jnp.asarray(c + 0.1 * generator.normal(size=(count, 4, 4, 1)), jnp.float32)


@pytest.mark.slow
def test_a_trained_model_has_the_data_s_moments():
    """Of two components that the whole image shares: their share, their means, the deviation, and no mixed images."""
    network = "mar(width=16,depth=1,heads=2,buffer=2,mlp_width=64,mlp_depth=2)"
    it = family(ImageSpec(size=4, channels=1, num_classes=0), network=network)
    settings = TrainSettings(
        steps=200, learning_rate=8e-3, learning_rate_schedule="cosine_decay_schedule", batch_size=64, ema={}
    )
    trainer, data = Trainer(it, settings, seed=0), two(64 * 200, seed=1).reshape(200, 64, 4, 4, 1)

    @jax.jit
    def learned(data):
        def step(state, image):
            return trainer.step(state, {"image": image, "index": jnp.arange(64, dtype=jnp.int32)}, {})[0], None

        return jax.lax.scan(step, trainer.init(), data)[0].params

    given = it.sampling({"solver": "heun", "solver_steps": 20})
    x = np.asarray(jax.jit(it.generate)(learned(data), keys(300), {}, given), np.float64).reshape(300, 16)
    of_image = x.mean(1)
    clear = np.abs(np.abs(of_image) - 0.5) < 0.15
    assert clear.mean() > 0.97
    assert np.mean(of_image > 0.0) == pytest.approx(0.5, abs=0.1)
    np.testing.assert_allclose([x[of_image > 0.0].mean(), x[of_image < 0.0].mean()], [0.5, -0.5], atol=0.03)
    assert (x - 0.5 * np.sign(of_image)[:, None])[clear].std() == pytest.approx(0.1, abs=0.03)


# ------------------------------------------------------------------------------------------ the family


@functools.cache
def generate():
    return jax.jit(family().generate)


def made(params=None, seed=0, label=None, **changes):
    """Images of labels 0, 1, 0, or of one."""
    label = jnp.arange(3, dtype=jnp.int32) % 2 if label is None else jnp.full(3, label, jnp.int32)
    params = weights() if params is None else params
    given = family().sampling(QUICK | changes)
    return np.asarray(generate()(params, keys(3, seed), {"label": label}, given))


@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_guidance_1_is_the_conditional_model_to_the_bit(schedule):
    """What is said of "no label" may be anything: here no number at all."""
    params = weights()["transformer"]
    places = params["places"] | {"label": jnp.asarray(params["places"]["label"]).at[-1].set(jnp.nan)}
    it, given = model(), family().sampling(QUICK | {"guidance_schedule": schedule})
    plain = jax.jit(lambda p: it.decoding.generate(p, keys(3), Shown(label=jnp.int32([0, 1, 0])), given))(params)
    spoilt = made({"transformer": params | {"places": places}}, guidance_schedule=schedule)
    np.testing.assert_array_equal(spoilt, it.decode({}, plain))
    assert np.any(made(guidance=4.0, guidance_schedule=schedule) != it.decode({}, plain))


def test_guidance_0_does_not_look_at_the_label():
    given = {"guidance": 0.0, "guidance_schedule": "constant"}
    np.testing.assert_array_equal(made(label=0, **given), made(label=1, **given))


def test_an_image_is_filled_in_around_what_is_known():
    """Known pixels come back to the bit and count, their patch being known; the others are made, by key and label."""
    image = jnp.asarray(np.random.default_rng(0).uniform(-1.0, 1.0, size=(3, 8, 8, 1)), jnp.float32)
    region = jnp.asarray(np.arange(64).reshape(1, 8, 8, 1) < 36).repeat(3, axis=0)  # a row of patches in part
    inpaint = jax.jit(family().edits["inpaint"])

    def filled_in(image=image, label=0, seed=0):
        inputs = {"image": image, "known": region, "label": jnp.full(3, label, jnp.int32)}
        return np.asarray(inpaint(weights(), keys(3, seed), inputs, family().sampling(QUICK)))

    whole, own = filled_in(), np.asarray(region)
    np.testing.assert_array_equal(whole[own], np.asarray(image)[own])
    np.testing.assert_array_equal(whole, filled_in(image=jnp.where(region | (own.cumsum(2) > 0), image, 1.0)))
    assert np.any(whole != filled_in(seed=1))
    assert np.any(whole != filled_in(label=1))
    assert np.any((whole != filled_in(image=-image))[~own])


def test_costs_are_counted_as_they_happen():
    """Three runs of the transformer, and nine of the MLP: together they are the FLOPs of both."""
    it, given = family(), family().sampling(QUICK)
    asked = cost.evaluations(it, SPEC, weights(), given)
    flops = cost.sampling_flops(it, SPEC, weights(), given, 10, asked)
    network, params = model().decoding.network, weights()["transformer"]
    latents, masked, label, x, time = network.example
    encode = multiply_adds_of(network.encode, params, latents, masked, label)
    denoise = multiply_adds_of(network.denoise, params, x, time, normals(1, 16, 16))
    assert flops == pytest.approx(2.0 * (3 * encode + 9 * denoise))


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"steps": 17}, r"sample.steps = 17: must be at most 16"),
        ({"top_k": 3}, r"sample.top_k = 3: MAR decoding does not read it"),
        ({"choice_temperature": 1.0}, r"sample.choice_temperature = 1.0: MAR"),
        ({"solver": "huen"}, r"sample.solver = 'huen'.*'heun'"),
        ({"grid": "custom", "solver_steps": 7}, r"sample.solver_steps = 7: does not fit the grid custom"),
        ({"guidance_schedule": "cosine"}, r"sample.guidance_schedule = 'cosine'"),
        ({"temperature": -1.0}, r"sample.temperature = -1.0"),
    ],
)
def test_impossible_options_are_refused_by_name(section, says):
    with pytest.raises(UserError, match=says):
        family().sampling(section)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"network": "gpt"}, r"family.network = 'gpt'.*discrete tokens"),
        ({"decoding": "maskgit"}, r"family.decoding: maskgit: needs a network of masked tokens"),
        ({"decoding": "mar(objective='denoising')"}, r"family.decoding.*must be learned_variance"),
        ({"decoding": "mar(schedule='cosin')"}, r"family.decoding: schedule = 'cosin'.*'cosine'"),
        ({"decoding": "mar(prediction='x0',schedule='ve')"}, None),
        ({"decoding": "mar(prediction='eps',schedule='zero_terminal_snr')"}, r"family.decoding.*do not determine"),
        ({"decoding": "mar(least=1.0)"}, r"least must lie in \[0, 1\)"),
        ({"decoding": "mar(repeats=0)"}, r"repeats must be at least 1"),
        ({"label_smoothing": 0.1}, r"family.label_smoothing = 0.1: mar has no tokens"),
        ({"tokenizer": "patches(size=3)"}, r"family.tokenizer.*size must divide"),
        ({"tokenizer": "pixels"}, None),
    ],
)
def test_rows_that_do_not_fit_are_refused_by_name(fields, says):
    section = {"name": "transformer", "network": NETWORK, "decoding": "mar", "tokenizer": "patches", **fields}
    if says is None:
        families.build(section, SPEC, "float32")
        return
    with pytest.raises(UserError, match=says):
        families.build(section, SPEC, "float32")


def test_the_family_s_row():
    assert transformer.DECODINGS["mar"] is MAR
