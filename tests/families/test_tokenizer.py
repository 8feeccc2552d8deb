"""The tokenizer family: its losses by hand, the weight between them, and the ways to images and back."""

import functools
import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import families, rng
from diffusion_jax.errors import UserError
from diffusion_jax.families.tokenizer import Adaptive, function_of, last_kernel, with_last_kernel
from diffusion_jax.networks import build_classifier
from diffusion_jax.networks import tokenizer as networks
from diffusion_jax.settings import TrainSettings
from diffusion_jax.tokenizers import autoencoder
from diffusion_jax.tokenizers.perceptual import Classifier
from diffusion_jax.training.step import Trainer
from diffusion_jax.types import Context, ImageSpec
from tests.arrays import filled, normals

SPEC = ImageSpec(size=8, channels=1, num_classes=0)
NETWORK = "maskgit(channels=8,multipliers=(1,1),blocks=1)"
BOTTLENECKS = {
    "kl": "kl(latents=2)",
    "vq": "vq(codes=5,latents=2)",
    "ema": "vq(codes=5,latents=2,codebook='ema',revive=0.1)",
    "fsq": "fsq(levels=(3,4))",
    "lfq": "lfq(bits=3)",
}
JUDGE = "patchgan(channels=4,halvings=1)"

pytestmark = pytest.mark.usefixtures("quick_compilation")


@functools.cache
def family(bottleneck="kl", **fields):
    section = {"name": "tokenizer", "network": NETWORK, "bottleneck": BOTTLENECKS[bottleneck], **fields}
    return families.build(section, SPEC, "float32")


@functools.cache
def weights(bottleneck="kl", **fields):
    return filled(lambda key: family(bottleneck, **fields).init(key)[0])


def batch(count=4, seed=0):
    return {"image": jnp.tanh(normals(count, 8, 8, 1, seed=seed)), "index": jnp.arange(count, dtype=jnp.int32)}


def context(extra, step=0, batch=None):
    key = jax.random.key(7)
    return Context(batch=batch, key=key, common=key, step=jnp.asarray(step, jnp.int32), extra=extra, ema={}, frozen={})


@functools.cache
def parts(bottleneck="kl"):
    return autoencoder.build(NETWORK, BOTTLENECKS[bottleneck], SPEC, "float32")


@functools.cache
def judge():
    return networks.build_discriminator("family.discriminator", JUDGE, SPEC, "float32")


def keys(count):
    return rng.example_keys(jax.random.key(5), jnp.arange(count))


# ------------------------------------------------------------------------------------------ losses


@pytest.mark.parametrize(("error", "by_hand"), [("l1", np.abs), ("l2", np.square)])
def test_the_loss_is_the_error_and_the_bottleneck_s_own(error, by_hand):
    """The mean over the image's numbers, and the bottleneck's loss, of the reconstruction that both players share."""
    it, params = family("vq", error=error), weights("vq")
    extra = it.init(jax.random.key(0))[1]
    (player,) = it.players
    loss, aux = jax.jit(lambda params, batch: player.loss(params, context(extra, batch=batch)))(params, batch())
    common = rng.example_keys(jax.random.key(7), jnp.arange(4))
    made, passed = parts("vq").train(params["autoencoder"], extra["bottleneck"], batch()["image"], common, jnp.int32(0))
    expected = by_hand(np.asarray(batch()["image"], np.float64) - np.asarray(made, np.float64)).mean()
    np.testing.assert_allclose(aux.metrics["error"], expected, rtol=1e-5)
    np.testing.assert_allclose(loss, expected + np.mean(passed.loss), rtol=1e-5)
    assert np.mean(passed.loss) > 0.01


@functools.cache
def compiled_losses(**fields):
    it = family("kl", discriminator=JUDGE, **fields)
    both = lambda params, extra, batch, step: {
        player.name: player.loss(params, context(extra, step, batch)) for player in it.players
    }
    return jax.jit(both)


def losses(fields, step, params, extra, batch):
    """{player: (loss, aux)} of the KL autoencoder against a discriminator."""
    return compiled_losses(**fields)(params, extra, batch, jnp.int32(step))


@pytest.mark.parametrize("loss", ["hinge", "non_saturating"])
def test_the_two_losses_by_hand(loss):
    """Over patches, from the logits of images and reconstructions; with a fixed weight."""
    fields = {"loss": loss, "balance": "fixed(weight=0.3)"}
    params, data = weights("kl", discriminator=JUDGE), batch()
    extra = family("kl", discriminator=JUDGE).init(jax.random.key(0))[1]
    found = losses(fields, 0, params, extra, data)
    common = rng.example_keys(jax.random.key(7), jnp.arange(4))
    made, passed = parts().train(params["autoencoder"], {}, data["image"], common, jnp.int32(0))
    real, fake = (np.asarray(judge().apply(params["discriminator"], x), np.float64) for x in (data["image"], made))
    assert real.shape == (4, 2, 2)
    softplus = lambda a: np.log1p(np.exp(a))
    of_discriminator, of_generator = {
        "hinge": (np.maximum(0, 1 - real) + np.maximum(0, 1 + fake), -fake),
        "non_saturating": (softplus(-real) + softplus(fake), softplus(-fake)),
    }[loss]
    np.testing.assert_allclose(found["discriminator"][0], of_discriminator.mean(), rtol=1e-4)
    plain = np.abs(np.asarray(data["image"]) - np.asarray(made)).mean() + np.mean(passed.loss)
    np.testing.assert_allclose(found["autoencoder"][0], plain + 0.3 * of_generator.mean(), rtol=1e-4)


def test_the_discriminator_enters_at_its_step():
    """Before, the autoencoder's loss is that without it."""
    fields, data = {"balance": "fixed(weight=3.0)", "discriminator_start": 2}, batch()
    params = weights("kl", discriminator=JUDGE)
    extra = family("kl", discriminator=JUDGE).init(jax.random.key(0))[1]
    alone = family("kl").players[0].loss(params, context({"bottleneck": {}}, 1, data))[0]
    before, after = (losses(fields, step, params, extra, data) for step in (1, 2))
    np.testing.assert_allclose(before["autoencoder"][0], alone, rtol=1e-5)
    assert abs(float(after["autoencoder"][0]) - float(alone)) > 1e-3


def test_the_discriminator_s_optimizer_waits_with_it():
    """Neither parameters nor moments move before its step; there Adam's first update is 1 learning rate, as in step 0.

    The learning rate is that of the step, here (1 - 2/4) of the config's.
    """
    it = family("kl", discriminator=JUDGE, discriminator_start=2)
    schedule = {"learning_rate_schedule": "linear_schedule(end_value=0.0)", "steps": 4, "clip_norm": 0.0}
    trainer = Trainer(it, TrainSettings(**TRAIN, **schedule), seed=0)
    step, states, seen = jax.jit(trainer.step), [jax.jit(trainer.init)()], []
    for i in range(3):
        state, metrics = step(states[-1], batch(seed=i), {})
        states.append(state)
        seen.append(float(metrics["discriminator/loss"]))
    own = [(state.params["discriminator"], state.opt_state["discriminator"]) for state in states]
    jax.tree.map(np.testing.assert_array_equal, own[0], own[2])
    assert np.isnan(seen[0])
    assert np.isnan(seen[1])
    assert seen[2] > 0.1
    moved = np.concatenate(
        [np.abs(b - a).ravel() for a, b in zip(*map(jax.tree.leaves, (own[2][0], own[3][0])), strict=True)]
    )
    np.testing.assert_allclose(np.median(moved), 0.5e-2, rtol=1e-2)


# ------------------------------------------------------------------------------------------ the weight


def test_the_adaptive_weight_is_the_ratio_of_the_last_layer_s_gradients():
    """Esser et al. 2021, eq. 7, with whole gradients of two losses; used in the next step, 0 in the first."""
    fields = {"balance": "adaptive(weight=0.8)"}
    params, data = weights("kl", discriminator=JUDGE), batch()
    it = family("kl", discriminator=JUDGE, **fields)
    extra = it.init(jax.random.key(0))[1]
    common = rng.example_keys(jax.random.key(7), jnp.arange(4))

    def of(which, kernel):
        own = with_last_kernel(params["autoencoder"], kernel)
        made, _ = parts().train(own, {}, data["image"], common, jnp.int32(0))
        if which == "error":
            return jnp.mean(jnp.abs(data["image"] - made))
        return -jnp.mean(judge().apply(params["discriminator"], made))

    kernel = last_kernel(params["autoencoder"])
    error, adversarial = (jax.jit(jax.grad(functools.partial(of, which)))(kernel) for which in ("error", "judge"))
    expected = 0.8 * np.linalg.norm(error) / (np.linalg.norm(adversarial) + 1e-4)

    first = losses(fields, 0, params, extra, data)["autoencoder"][1]
    assert float(first.metrics["balance"]) == 0.0
    second = losses(fields, 1, params, first.extra, data)["autoencoder"]
    np.testing.assert_allclose(second[1].metrics["balance"], expected, rtol=1e-4)
    silent = losses({"balance": "adaptive(weight=0.8)", "discriminator_start": 9}, 1, params, first.extra, data)
    difference = float(second[0]) - float(silent["autoencoder"][0])
    np.testing.assert_allclose(difference, expected * float(second[1].metrics["adversarial"]), rtol=1e-3, atol=1e-5)
    halves = losses(fields, 0, params, extra, {name: rows[:2] for name, rows in data.items()})["autoencoder"][1]
    both = losses(fields, 0, params, halves.extra, {name: rows[2:] for name, rows in data.items()})["autoencoder"][1]
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, both.extra["gradients"], first.extra["gradients"])


def test_the_adaptive_weight_has_an_end():
    gradients = family("kl", discriminator=JUDGE).init(jax.random.key(0))[1]["gradients"]
    wide = gradients._replace(error=gradients.error + 1.0, images=jnp.float32(1.0))
    np.testing.assert_allclose(Adaptive(weight=2.0, most=50.0)(wide), 100.0)
    np.testing.assert_allclose(Adaptive(weight=2.0)(gradients), 0.0)


# ------------------------------------------------------------------------------------------ the perceptual term

CLASSES = ImageSpec(size=8, channels=1, num_classes=3)


def test_the_perceptual_distance_joins_the_error():
    """By the maps of the classifier that the trainer was given, times its weight; equal images are not apart."""
    section = {"name": "tokenizer", "network": NETWORK, "bottleneck": "kl(latents=2)"}
    it = families.build(section | {"perceptual": "classifier(weight=0.7)"}, CLASSES, "float32")
    judge = build_classifier(CLASSES, 64)
    frozen = it.frozen(lambda: {"network": filled(judge.init), "mean": None})
    extra = it.init(jax.random.key(0))[1]
    ctx = replace(context(extra, batch=batch()), frozen=frozen)
    found = jax.jit(lambda p: it.players[0].loss(p, ctx)[1].metrics["error"])(weights("kl"))
    common = rng.example_keys(jax.random.key(7), jnp.arange(4))
    image = batch()["image"]
    made, _ = parts().train(weights("kl")["autoencoder"], {}, image, common, jnp.int32(0))
    distance = Classifier(spec=CLASSES)
    apart = distance(frozen["perceptual"], image, made)
    assert np.all(apart > 1e-3)
    np.testing.assert_array_equal(distance(frozen["perceptual"], image, image), np.zeros(4))
    np.testing.assert_allclose(found, np.mean(np.abs(image - made)) + 0.7 * np.mean(apart), rtol=1e-5)
    assert family("kl").frozen is None


# ------------------------------------------------------------------------------------------ what a preset brings


@pytest.mark.parametrize(
    ("network", "count"), [("kl-f8", 83_653_863), ("kl-f8-16", 83_819_683), ("vqgan-f16-1024", 72_141_699)]
)
def test_a_preset_brings_its_bottleneck(network, count):
    """The published numbers of parameters, codebook and convolutions around it among them."""
    spec = ImageSpec(size=256, channels=3, num_classes=0)
    own = families.build({"name": "tokenizer", "network": network}, spec, "float32")
    shapes = jax.eval_shape(own.init, jax.random.key(0))[0]["autoencoder"]
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count
    other = families.build({"name": "tokenizer", "network": network, "bottleneck": "fsq"}, spec, "float32")
    assert other.tokenizer.vocabulary == 1000
    assert families.build({"name": "tokenizer", "network": NETWORK}, SPEC, "float32").tokenizer.vocabulary == 1024


def test_what_a_frozen_tokenizer_is():
    """Its network, and its bottleneck however that is written; not what it is trained by."""
    of = lambda **section: function_of({"name": "tokenizer", "network": NETWORK, **section})
    one = of(bottleneck="vq(codes=5,latents=2)")
    assert one == of(bottleneck="vq(latents=2,codes=5,beta=0.5,codebook='ema',revive=0.1)", error="l2")
    assert one == of(bottleneck="vq(codes=5,latents=2)", discriminator=JUDGE, discriminator_start=3, loss="hinge")
    assert of(bottleneck="kl(latents=2)") == of(bottleneck="kl(latents=2,weight=0.1)")
    assert of(network="kl-f8") == of(network="kl-f8", bottleneck="kl-f8") == of(network="kl-f8", bottleneck="kl")
    others = [
        one,
        of(bottleneck="vq(codes=6,latents=2)"),
        of(bottleneck="fsq(levels=(2,2))"),
        of(bottleneck="lfq(bits=2)"),
        of(bottleneck="fsq(levels=(3,4))"),
        of(bottleneck="fsq(levels=(4,3))"),
        of(bottleneck="residual(scales=(1,2))"),
        of(bottleneck="residual(scales=(1,4))"),
        of(network="kl-f8"),
        of(network="kl-f16"),
    ]
    assert len(set(map(repr, others))) == len(others)


# ------------------------------------------------------------------------------------------ the codebook in a run

TRAIN = {"batch_size": 4, "learning_rate": 1e-2, "optimizer": "adam", "ema": {}}


@functools.cache
def trained(accumulate=1, steps=3):
    """States after each step of the autoencoder whose codebook is of running means."""
    trainer = Trainer(family("ema"), TrainSettings(**TRAIN, accumulate=accumulate), seed=0)
    step, states = jax.jit(trainer.step), [jax.jit(trainer.init)()]
    for i in range(steps):
        states.append(step(states[-1], batch(seed=i), {})[0])
    return states


def test_the_codebook_follows_the_outputs_without_a_gradient():
    """After each update it is what the state without gradient says; and the parameters hold it, for sampling."""
    states, between = trained(), parts("ema").bottleneck
    for before, after in itertools.pairwise(states):
        codebook = after.params["autoencoder"]["codebook"]
        assert not np.array_equal(codebook, before.params["autoencoder"]["codebook"])
        given = before.params["autoencoder"] | {"codebook": jnp.zeros_like(codebook)}
        settled = between.settle(given, after.extra["bottleneck"])["codebook"]
        used = np.asarray(between.advanced(after.extra["bottleneck"])["usage"].shares) > 0.0
        np.testing.assert_allclose(codebook[used], settled[used], rtol=1e-6)
        assert used.any()


def test_microbatches_leave_the_codebook_alike():
    for one, two in zip(trained(), trained(accumulate=2), strict=True):
        close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4)
        jax.tree.map(close, (one.params, one.extra), (two.params, two.extra))


def test_collapse_is_told_by_name():
    """Below a tenth of the codes that can have been seen, where one is all that is used of a few, or where nearly all
    tokens are few of many: below a fiftieth of those codes, used alike.

    Not without codes, and not where nothing is known yet.
    """
    (warning,) = family("vq").warnings({"usage": 0.05, "usable": 1.0}).items()
    assert warning[0] == "collapse"
    assert "of 5 codes 5.0% are in use" in warning[1]
    assert set(family("vq", discriminator=JUDGE).warnings({"autoencoder/usage": 0.05, "autoencoder/usable": 0.9})) == {
        "collapse"
    }
    assert set(family("vq").warnings({"usage": 1 / 5, "usable": 1.0})) == {"collapse"}
    assert set(family("vq").warnings({"usage": 3 / 5, "usable": 1.0, "perplexity": 1.05})) == {"collapse"}
    assert set(family("fsq").warnings({"usage": 1 / 12, "usable": 0.99})) == {"collapse"}
    large = families.build(
        {"name": "tokenizer", "network": NETWORK, "bottleneck": "fsq(levels=(8,5,5,5))"}, SPEC, "float32"
    )
    for usable in (1.0, 0.5):
        for share, perplexity, told in (
            (0.09, 500.0, True),
            (0.11, 500.0, False),
            (0.5, 19.0, True),
            (0.5, 21.0, False),
        ):
            seen = {"usage": usable * share, "usable": usable, "perplexity": usable * perplexity}
            assert ("collapse" in large.warnings(seen)) == told, seen
    nothing = {"usage": float("nan"), "usable": float("nan")}
    for name, metrics in (
        ("vq", {"usage": 2 / 5, "usable": 1.0, "perplexity": 1.3}),
        ("fsq", {"usage": 2 / 12, "usable": 1.0}),
        ("vq", {"usage": 0.2, "usable": 0.3}),
        ("vq", nothing),
        ("kl", {"kl": 0.0}),
    ):
        assert family(name).warnings(metrics) == {}


# ------------------------------------------------------------------------------------------ images


@functools.cache
def compiled(bottleneck, part):
    it = family(bottleneck)
    return jax.jit(it.generate if part == "generate" else getattr(it.latent, part))


@pytest.mark.parametrize("bottleneck", [name for name in BOTTLENECKS if name != "ema"])
def test_reconstructions_are_what_the_decoder_makes_of_codes(bottleneck):
    """There by `encode`, back by `decode`: of codes to the bit, since a digit is not changed by the way through z."""
    params, images = weights(bottleneck), batch(6)["image"]
    z = compiled(bottleneck, "encode")(params, images, keys(6), {}, ())
    made = compiled(bottleneck, "decode")(params, z, keys(6), {}, ())
    built = parts(bottleneck)
    expected = built.decode(params["autoencoder"], built.encode(params["autoencoder"], images, None))
    assert z.shape == (6, *family(bottleneck).latent.shape)
    np.testing.assert_allclose(made, expected, atol=1e-5)
    assert np.ptp(expected) > 0.1


# ------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"network": "vqgn"}, "family.network.*did you mean 'vqgan'"),
        ({"bottleneck": "fsk"}, "family.bottleneck.*did you mean 'fsq'"),
        ({"error": "l3"}, "family.error = 'l3': must be one of l1, l2"),
        ({"discriminator": "patchgn"}, "family.discriminator.*did you mean 'patchgan'"),
        ({"discriminator": "patchgan"}, "family.discriminator.*must be at least 24 pixels wide, and 8 is less"),
        ({"loss": "hing"}, "family.loss.*did you mean 'hinge'"),
        ({"balance": "adaptve"}, "family.balance.*did you mean 'adaptive'"),
        ({"balance": "fixed(weight=0.0)"}, "family.balance.*weight must be positive"),
        ({"discriminator_start": -1}, "family.discriminator_start = -1"),
        ({"discriminator_rate": 0.0}, "family.discriminator_rate = 0.0"),
        ({"perceptual": "vgg"}, "family.perceptual = 'vgg'.*Known: classifier, lpips"),
        ({"perceptual": "classifier"}, "family.perceptual: classifier: needs data with classes"),
        ({"perceptual": "lpips"}, "family.perceptual: lpips needs the option 'path'"),
        ({"perceptual": "lpips(path='a.npz')"}, "family.perceptual: lpips: needs images of at least 16 pixels a side"),
    ],
)
def test_impossible_settings_are_refused(fields, says):
    with pytest.raises(UserError, match=says):
        families.build({"name": "tokenizer", "network": NETWORK, **fields}, SPEC, "float32")


def test_there_is_nothing_to_choose_in_sampling():
    with pytest.raises(UserError, match="temperature"):
        family("kl").sampling({"temperature": 1.0})
