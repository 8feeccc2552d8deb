"""The game of two players: whose loss is what, what they share, what changes without gradient, and truncation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import families, rng
from diffusion_jax.errors import UserError
from diffusion_jax.networks import gan as networks
from diffusion_jax.settings import TrainSettings
from diffusion_jax.training.step import Trainer
from diffusion_jax.types import Context, ImageSpec

LABELLED = ImageSpec(size=8, channels=1, num_classes=3)
PLAIN = ImageSpec(size=8, channels=1, num_classes=0)
SMALL = {"generator": "dcgan(width=8,latent=4)", "discriminator": "dcgan(width=8)"}
STYLE = "stylegan2(latent=8,style=8,mapping_layers=1,channels_base=64,channels_max=8)"
R3GAN = "r3gan(channels_base=64,channels_max=8,blocks=1,group=16)"
BLIT = "ada(geometry=False,color=False,images=100,every=1{})"


pytestmark = pytest.mark.usefixtures("quick_compilation")


def family(spec=LABELLED, **fields):
    """Without penalties, which take long to compile, unless `fields` say otherwise."""
    return families.build({"name": "gan", "regularisers": ""} | SMALL | fields, spec, "float32")


def batch(spec=LABELLED, count=8, seed=0):
    images = np.random.default_rng(seed).uniform(-1, 1, (count, *spec.shape))
    label = {"label": jnp.arange(count, dtype=jnp.int32) % spec.num_classes} if spec.num_classes else {}
    return {"image": jnp.asarray(images, jnp.float32), "index": jnp.arange(count, dtype=jnp.int32)} | label


def context(extra, step=0, spec=LABELLED):
    keys = {"key": jax.random.key(3), "common": jax.random.key(4)}
    return Context(batch=batch(spec), **keys, step=jnp.int32(step), extra=extra, ema={}, frozen={})


def loss_of(player, params, extra, step=0, spec=LABELLED):
    return jax.jit(lambda params, extra: player.loss(params, context(extra, step, spec))[0])(params, extra)


def keys(count=4, seed=0):
    return rng.sample_keys(jnp.uint32(seed), jnp.arange(count))


def condition(label=(0, 1, 2, 0)):
    return {"label": jnp.int32(label)}


def trained(it, count, data, **train):
    """(state, metrics) after each of `count` steps."""
    trainer = Trainer(it, TrainSettings(**{"learning_rate": 1e-3, "batch_size": 8} | train), seed=0)
    step, state, steps = jax.jit(trainer.step), jax.jit(trainer.init)(), []
    for _ in range(count):
        state, metrics = step(state, data, {})
        steps.append((state, metrics))
    return steps


# ------------------------------------------------------------------------------------------ the game


@pytest.mark.parametrize("spec", [LABELLED, PLAIN], ids=["classes", "plain"])
def test_both_losses_by_hand(spec):
    """Relativistic with R1 and R2: from the networks alone, at the z that the common key draws."""
    it = family(spec, loss="relativistic", regularisers="r1(gamma=0.5) + r2(gamma=2.0)")
    params, extra = it.init(jax.random.key(0))
    ctx = context(extra, spec=spec)
    real, label = ctx.batch["image"], ctx.batch.get("label")
    G = networks.build_generator("g", SMALL["generator"], spec)
    D = networks.build_discriminator("d", SMALL["discriminator"], spec)
    z = rng.normal(rng.fold(rng.example_keys(ctx.common, ctx.batch["index"]), 0), (4,))
    fake = G.apply(params["generator"], z, label, None)
    critic = lambda x: D.apply(params["discriminator"], x, label)
    slope = lambda x: np.sum(np.square(jax.jit(jax.grad(lambda x: jnp.sum(critic(x))))(x)), axis=(1, 2, 3))
    difference = np.asarray(critic(real) - critic(fake), np.float64)
    of_d = np.log1p(np.exp(-difference)) + 0.25 * slope(real) + slope(fake)
    losses = {player.name: loss_of(player, params, extra, spec=spec) for player in it.players}
    np.testing.assert_allclose(losses["discriminator"], np.mean(of_d), rtol=1e-4)
    np.testing.assert_allclose(losses["generator"], np.mean(np.log1p(np.exp(difference))), rtol=1e-4)


def test_the_discriminator_moves_first_and_each_at_its_own_rate():
    it = family(generator_every=3, discriminator_rate=4.0)
    assert [(player.name, player.every, player.rate) for player in it.players] == [
        ("discriminator", 1, 4.0),
        ("generator", 3, 1.0),
    ]


def test_the_generator_moves_every_so_many_steps():
    steps = trained(family(PLAIN, generator_every=2), 4, batch(PLAIN), optimizer="sgd")
    first, second, third, fourth = (np.asarray(state.params["generator"]["in"]["kernel"]) for state, _ in steps)
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(second, third)
    np.testing.assert_array_equal(third, fourth)
    assert [bool(np.isnan(metrics["generator/loss"])) for _, metrics in steps] == [False, True, False, True]


def test_microbatches_add_up_to_the_batch_whatever_changes_without_gradient():
    """Spectral norms and ADA's p move once a step, not once a microbatch."""
    it = family(spectral_norm="both", augmentation=BLIT.format(",start=0.5"))
    whole, parts = (trained(it, 3, batch(), optimizer="sgd", accumulate=count)[-1][0] for count in (1, 4))
    for name in ("params", "extra"):
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
        jax.tree.map(close, getattr(whole, name), getattr(parts, name))
    assert float(whole.extra["augmentation"].p) != 0.5


def test_lazy_penalties_count_in_their_steps():
    """The discriminator's loss rises by `every` times the penalty in step 0, and by nothing in step 1."""
    losses = {}
    for text in ("", "r1(gamma=2.0)", "r1(gamma=2.0,every=4)"):
        it = family(regularisers=text)
        params, extra = it.init(jax.random.key(0))
        losses[text] = [float(loss_of(it.players[0], params, extra, step)) for step in (0, 1)]
    none, always, lazy = (np.array(value) for value in losses.values())
    penalty = always - none
    assert np.all(penalty > 1e-6)
    np.testing.assert_allclose(lazy - none, [4.0 * penalty[0], 0.0], rtol=1e-3, atol=1e-7)


def test_augmentation_is_what_the_discriminator_sees_both_kinds_of_images_through():
    """At p = 0 the losses are those without; at p = 1 both players' are others, and G's gradient is not 0."""
    bare = family()
    params, extra = bare.init(jax.random.key(0))
    plain = [loss_of(player, params, extra) for player in bare.players]
    for start in (0.0, 1.0):
        it = family(augmentation=BLIT.format(f",start={start}"))
        extra = it.init(jax.random.key(0))[1]
        assert np.allclose([loss_of(player, params, extra) for player in it.players], plain, rtol=1e-6) == (
            start == 0.0
        )
        own = lambda mine, extra=extra, it=it: loss_of(it.players[1], params | {"generator": mine}, extra)
        gradient = jax.grad(own)(params["generator"])
        assert all(np.abs(leaf).max() > 0.0 for leaf in jax.tree.leaves(gradient))


def test_p_and_r_t_are_in_the_log_and_p_rises_as_the_discriminator_learns():
    """While the generator rests, 8 real images are soon known: r_t is 1, and p goes up by 8/100 a step."""
    it = family(PLAIN, augmentation=BLIT.format(""), loss="hinge", generator_every=1000)
    bright = batch(PLAIN) | {"image": jnp.full((8, *PLAIN.shape), 0.9)}
    steps = trained(it, 12, bright, learning_rate=0.01)
    assert [float(metrics["discriminator/r_t"]) for _, metrics in steps[-4:]] == [1.0] * 4
    p = [float(metrics["discriminator/p"]) for _, metrics in steps]
    assert p[0] == 0.0
    np.testing.assert_allclose(np.diff(p)[-3:], 0.08, atol=1e-6)
    assert float(steps[-1][0].extra["augmentation"].p) == p[-1]


# ------------------------------------------------------------------------------------------ spectral norms


def svd_normalised(params):
    """Each kernel over its largest singular value, in NumPy."""

    def divide(path, leaf):
        matrix = np.asarray(leaf).reshape(-1, leaf.shape[-1])
        is_kernel = jax.tree_util.keystr(path).endswith("['kernel']")
        return leaf / np.linalg.svd(matrix, compute_uv=False)[0] if is_kernel else leaf

    return jax.tree_util.tree_map_with_path(divide, params)


def test_a_normalised_generator_samples_from_its_weights_alone():
    """As another, plain one from weights that are divided by hand."""
    it, plain = family(spectral_norm="both"), family()
    params, _ = it.init(jax.random.key(0))
    params = jax.tree.map(lambda leaf: 3.0 * leaf + 0.01, params)
    images = it.generate(params, keys(), condition(), it.sampling({}))
    divided = params | {"generator": svd_normalised(params["generator"])}
    by_hand = plain.generate(divided, keys(), condition(), plain.sampling({}))
    np.testing.assert_allclose(images, by_hand, atol=1e-4)
    assert not np.allclose(images, plain.generate(params, keys(), condition(), plain.sampling({})), atol=1e-2)


def test_a_normalised_discriminator_does_not_know_the_scale_of_its_kernels():
    """Once the vectors are there, kernels 5 times as large give the same loss; biases do count."""
    it = family(spectral_norm="discriminator")
    params, extra = it.init(jax.random.key(0))
    advance = jax.jit(lambda extra, step: it.players[0].loss(params, context(extra, step))[1].extra)
    for step in range(40):
        extra = advance(extra, step)
    grown = jax.tree_util.tree_map_with_path(
        lambda path, leaf: 5.0 * leaf if "kernel" in jax.tree_util.keystr(path) else leaf, params["discriminator"]
    )
    first, second = (
        loss_of(it.players[0], params | {"discriminator": own}, extra, step=40)
        for own in (params["discriminator"], grown)
    )
    np.testing.assert_allclose(first, second, rtol=1e-5)
    divided, bare = params | {"discriminator": svd_normalised(params["discriminator"])}, family()
    by_hand = loss_of(bare.players[0], divided, bare.init(jax.random.key(0))[1])
    np.testing.assert_allclose(first, by_hand, rtol=1e-3)


# ------------------------------------------------------------------------------------------ sampling


@functools.cache
def styled():
    it = family(generator=STYLE)
    return it, it.init(jax.random.key(0))[0], jax.jit(it.generate)


def test_generate_is_decode_of_draw():
    it = family()
    params, _ = it.init(jax.random.key(0))
    options = it.sampling({"truncation": "normal(bound=0.5)"})
    z = it.latent.draw(keys(), options)
    images = it.latent.decode(params, z, keys(), condition(), options)
    np.testing.assert_array_equal(it.generate(params, keys(), condition(), options), images)
    assert z.shape == (4, *it.latent.shape)
    assert it.latent.encode is None


def test_truncated_normals():
    """Within the bound, spread as SciPy says, each from its own key; plain normals without."""
    from scipy.stats import truncnorm

    it = family()
    z = np.asarray(it.latent.draw(keys(2000), it.sampling({"truncation": "normal(bound=1.2)"})))
    assert np.abs(z).max() <= 1.2
    np.testing.assert_allclose(z.std(), truncnorm.std(-1.2, 1.2), rtol=0.03)
    np.testing.assert_array_equal(it.latent.draw(keys(3), it.sampling({"truncation": "normal(bound=1.2)"})), z[:3])
    plain = np.asarray(it.latent.draw(keys(2000), it.sampling({})))
    np.testing.assert_allclose((plain.mean(), plain.std()), (0.0, 1.0), atol=0.03)


def test_truncation_of_the_style():
    """psi = 1 changes nothing; at 0 all z give the image of the mean style; images come nearer to it in between."""
    it, params, generate = styled()
    made = lambda truncation: generate(params, keys(), condition(), it.sampling({"truncation": truncation}))
    whole, mean = made("none"), made("style(psi=0.0)")
    np.testing.assert_allclose(made("style(psi=1.0)"), whole, atol=1e-5)
    np.testing.assert_allclose(mean, jnp.broadcast_to(mean[:1], mean.shape), atol=1e-5)
    near = np.abs(made("style(psi=0.3)") - mean).mean()
    assert 0.0 < near < np.abs(whole - mean).mean()


def test_how_far_truncation_goes_compiles_nothing():
    it, params, generate = styled()
    for psi in (0.2, 0.9):
        generate(params, keys(), condition(), it.sampling({"truncation": f"style(psi={psi})"}))
    before = generate._cache_size()
    generate(params, keys(), condition(), it.sampling({"truncation": "style(psi=0.5)"}))
    assert generate._cache_size() == before


def test_one_image_is_learned_and_drawn():
    """200 steps on one image: then every key draws it. A generator that learned nothing is off by 0.5 and more."""
    u = jnp.linspace(-0.8, 0.8, 8)
    image = (u[:, None] * jnp.sign(u)[None]).reshape(1, 8, 8, 1)
    data = {"image": jnp.tile(image, (8, 1, 1, 1)), "index": jnp.arange(8, dtype=jnp.int32)}
    it = family(PLAIN, regularisers="r1(gamma=0.1) + r2(gamma=0.1)")
    state, _ = trained(it, 200, data, learning_rate=1e-2, optimizer="adam(b1=0.0,b2=0.99)")[-1]
    images = jax.jit(it.generate)(state.params, keys(8), {}, it.sampling({}))
    off = float(np.abs(images - image).mean())
    assert off < 0.1, off


# ------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"loss": "hing"}, "family.loss = 'hing'.*did you mean 'hinge'"),
        ({"regularisers": "r1 + r5"}, "family.regularisers"),
        ({"regularisers": "r1 +"}, "on each side of a"),
        (
            {"spectral_norm": "generator"},
            "family.spectral_norm = 'generator': must be one of none, discriminator, both",
        ),
        ({"spectral_norm": "both", "generator": STYLE}, "family.spectral_norm = 'both': not for this generator: style"),
        ({"spectral_norm": "discriminator", "discriminator": R3GAN}, "family.spectral_norm.*this discriminator: r3gan"),
        ({"augmentation": "ada(bgc=True)"}, "family.augmentation: ada has no option 'bgc'"),
        ({"generator_every": 0}, "family.generator_every = 0"),
        ({"discriminator_rate": 0.0}, "family.discriminator_rate = 0.0"),
        ({"generator": "unet"}, "family.generator = 'unet'"),
        ({"discriminator": "resnet(multipliers=(1,1,1,1))"}, "family.discriminator.*cannot be"),
    ],
)
def test_impossible_settings_are_refused_by_name(fields, says):
    with pytest.raises(UserError, match=says):
        family(**fields)


def test_the_other_players_kernels_may_be_normalised():
    assert family(spectral_norm="discriminator", generator=STYLE).players[1].name == "generator"


@pytest.mark.parametrize(
    ("truncation", "says"),
    [
        ("style", "sample.truncation = 'style'.*needs a generator with a mapping"),
        ("normal(bound=0.0)", "bound must be positive"),
        ("normal(psi=0.5)", "no option 'psi'"),
        ("psi", "sample.truncation = 'psi'"),
    ],
)
def test_impossible_truncations_are_refused_by_name(truncation, says):
    with pytest.raises(UserError, match=says):
        family().sampling({"truncation": truncation})
