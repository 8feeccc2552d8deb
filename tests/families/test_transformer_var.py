"""Scale after scale: the cache beside the whole pass, who sees whom, guidance, the likelihood of a known process."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusion_jax import families, rng
from diffusion_jax.errors import UserError
from diffusion_jax.evaluation import cost
from diffusion_jax.families.transformer_draws import Shown, cross_entropy
from diffusion_jax.families.transformer_var import VAR
from diffusion_jax.networks import sequence
from diffusion_jax.tokenizers import Scales, autoencoder
from diffusion_jax.types import Context, ImageSpec, TokenSpec
from tests.arrays import filled, normals

pytestmark = pytest.mark.usefixtures("quick_compilation")

SPEC = ImageSpec(size=4, channels=1, num_classes=2, levels=5)
NETWORK = "var(width=16,depth=1,heads=2)"


def scale_of_each():
    """Of the 21 tokens of sides 1, 2 and 4, which `pyramid` has for 4 pixels."""
    return np.repeat([0, 1, 2], [1, 4, 16])


@functools.cache
def codes():
    """A tokenizer with parameters, of as many scales."""
    return autoencoder.build(
        "vqgan(channels=8,multipliers=(1,),blocks=1)",
        "residual(codes=6,latents=3,scales=(1,2,4),convolutions=2)",
        SPEC,
        "float32",
    )


@functools.cache
def family(over="pyramid", spec=SPEC, **fields):
    section = {"name": "transformer", "network": NETWORK, "decoding": "var", "tokenizer": over, **fields}
    given = (codes().tokenizer("autoencoder"),) if over.startswith("workdir:") else ()
    return families.build(section, spec, "float32", *given)


@functools.cache
def weights(over="pyramid"):
    """All at random, and with them a frozen tokenizer's."""
    params = filled(lambda key: family(over).init(key)[0])
    return params | ({"tokenizer": {"params": frozen()}} if over.startswith("workdir:") else {})


@functools.cache
def frozen():
    """A codebook of the size of what the encoder gives."""
    params = filled(lambda key: codes().init(key)[0])
    y = codes().codec.encode(params, normals(8, 4, 4, 1))
    return params | {"codebook": jnp.std(y) * normals(6, 3, seed=3)}


OVER = ("pyramid", "workdir:codes")


def model(over="pyramid"):
    return family(over).generate.__self__


@functools.cache
def way(over="pyramid"):
    """How tokens are learned and drawn, with the tokenizer's parameters."""
    return model(over).way(weights(over))


def keys(count, seed=0):
    return rng.example_keys(jax.random.key(seed), jnp.arange(count))


LABEL = jnp.int32([0, 1, 0])


@functools.cache
def generate(over="pyramid"):
    """Compiled: tokens i32[3,21], as `Model.generate` has them drawn."""

    def tokens(params, options):
        draw = lambda shown: way(over).generate(params, keys(3), shown, options)
        return model(over).guided(draw, {"label": LABEL}, options)

    return jax.jit(tokens)


def tokens(over="pyramid", **section):
    return np.asarray(generate(over)(weights(over)["transformer"], family(over).sampling(section)))


@functools.cache
def whole(over="pyramid"):
    """(parameters, tokens i32[B,21], label) -> their logits by one pass without a cache."""
    it = way(over)
    return jax.jit(lambda params, tokens, label: it.network.apply(params, it.scales.inputs(tokens), label, None))


# ------------------------------------------------------------------------------------------ the cache


def greedy(over, guidance, grows):
    """The likeliest tokens of each scale, given those before it, by whole passes."""
    params, made = weights(over)["transformer"], jnp.zeros((3, 21), jnp.int32)
    for k in range(3):
        w = 1.0 + (guidance - 1.0) * k / 2 if grows else guidance
        shown, none = (np.asarray(whole(over)(params, made, label)) for label in (LABEL, jnp.full(3, 2, jnp.int32)))
        best = np.argmax(none + np.float32(w) * (shown - none), axis=-1)
        made = jnp.where(scale_of_each()[None] == k, best, made).astype(jnp.int32)
    return np.asarray(made)


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize(("guidance", "schedule"), [(1.0, ""), (3.0, ""), (3.0, "linear"), (3.0, "constant")])
def test_at_temperature_0_the_cache_changes_no_token(over, guidance, schedule):
    """With a weight that grows from 1 at the first scale to all of it at the last, where it does."""
    made = tokens(over, temperature=0.0, guidance=guidance, guidance_schedule=schedule)
    np.testing.assert_array_equal(made, greedy(over, guidance, schedule != "constant"))
    assert len(np.unique(made)) > 2


@pytest.mark.parametrize("over", OVER)
def test_a_scale_a_step_has_the_logits_of_the_whole_pass(over):
    """Of tokens at random; f^ is added up scale by scale."""
    it, params = way(over), weights(over)["transformer"]
    given = jnp.asarray(np.random.default_rng(0).integers(it.tokens.vocabulary, size=(3, 21)), jnp.int32)
    cache, f_hat, found = it.network.begin(3), it.scales.begin(3), []
    for k in range(3):
        logits, cache = jax.jit(it.network.step)(params, it.scales.shown(f_hat, k), LABEL, cache)
        f_hat = it.scales.added(f_hat, k, given[:, scale_of_each() == k])
        found.append(logits)
    np.testing.assert_allclose(np.concatenate(found, axis=1), whole(over)(params, given, LABEL), atol=1e-5)
    assert int(cache.position) == 21


@pytest.mark.parametrize("over", OVER)
def test_causality_by_scale(over):
    """Another token of scale k changes no logit of scale k or before it, and some of each later scale."""
    params, vocabulary = weights(over)["transformer"], way(over).tokens.vocabulary
    given = jnp.asarray(np.random.default_rng(0).integers(vocabulary, size=(3, 21)), jnp.int32)
    before = np.asarray(whole(over)(params, given, LABEL))
    for t in range(21):
        changed = given.at[:, t].set((given[:, t] + 1) % vocabulary)
        after = np.asarray(whole(over)(params, changed, LABEL))
        seen = scale_of_each() <= scale_of_each()[t]
        np.testing.assert_array_equal(after[:, seen], before[:, seen])
        for k in range(scale_of_each()[t] + 1, 3):
            assert np.all(np.abs(after - before)[:, scale_of_each() == k].max((1, 2)) > 1e-6)


def test_images_are_what_the_tokens_amount_to():
    """The family's own way: by keys, labels and the frozen tokenizer's decoder."""
    over = "workdir:codes"
    options = family(over).sampling({"guidance": 2.0})
    images = jax.jit(family(over).generate)(weights(over), keys(3), {"label": LABEL}, options)
    made = generate(over)(weights(over)["transformer"], options)
    of_tokens = model(over).stage.decode(weights(over), made)
    np.testing.assert_allclose(images, of_tokens, atol=1e-5)
    assert images.shape == (3, 4, 4, 1)


# ------------------------------------------------------------------------------------------ guidance


def test_guidance_1_is_the_conditional_model_to_the_bit():
    """What is said of "no label" may be anything: here no number at all."""
    params = weights()["transformer"]
    spoilt = params | {"label": jnp.asarray(params["label"]).at[-1].set(jnp.nan)}
    options = family().sampling({})
    plain = jax.jit(lambda params: way().generate(params, keys(3), Shown(label=LABEL), options))
    np.testing.assert_array_equal(generate()(spoilt, options), plain(params))
    assert np.any(tokens(guidance=4.0) != plain(params))


def test_growing_guidance_leaves_the_first_scale_to_the_conditional_model():
    """And gives all of it to the last; of a share in between as much of what the weight has above 1."""
    shown = Shown.both(LABEL, 2, jnp.float32(5.0))
    logits = normals(6, 1, 9)
    plain = np.asarray(logits)[:3]
    grown = lambda share, grows: shown.grown(jnp.float32(share), jnp.bool_(grows)).merged(logits)
    np.testing.assert_allclose(grown(0.0, True), plain, atol=1e-6)
    np.testing.assert_allclose(grown(1.0, True), shown.merged(logits), atol=1e-5)
    np.testing.assert_allclose(grown(0.0, False), shown.merged(logits), atol=1e-5)
    np.testing.assert_allclose(grown(0.25, True), replace(shown, weight=jnp.float32(2.0)).merged(logits), atol=1e-5)


# ------------------------------------------------------------------------------------------ likelihood


def test_bits_are_those_of_all_tokens_and_bound_the_image_s():
    """Of 2x2 pixels, black or white: all 3^5 tokens, whose probabilities add up to 1, and the 16 images they decode to.

    -log p(image) is the sum over all tokens that are decoded to it.
    """
    spec = ImageSpec(size=2, channels=1, num_classes=0, levels=2)
    it = family(spec=spec)
    params, inner = filled(lambda key: it.init(key)[0]), it.generate.__self__
    every = np.stack(np.meshgrid(*[np.arange(3)] * 5), axis=-1).reshape(-1, 5)
    nats = np.asarray(jax.jit(inner.way({}).nats)(params["transformer"], jnp.asarray(every), None), np.float64)
    np.testing.assert_allclose(np.exp(-nats).sum(), 1.0, rtol=1e-5)

    images = np.stack(np.meshgrid(*[[-1.0, 1.0]] * 4), axis=-1).reshape(-1, 2, 2, 1).astype(np.float32)
    given = {"image": jnp.asarray(images), "index": jnp.arange(16, dtype=jnp.int32)}
    bits = 4.0 * np.asarray(jax.jit(it.nll)(params, given, jax.random.key(0)), np.float64)
    decoded = np.asarray(inner.decode({}, jnp.asarray(every)))
    of_image = (decoded[:, None] == images[None]).all((2, 3, 4))
    assert np.all(of_image.sum(0) > 1)
    exact = -np.log2((np.exp(-nats)[:, None] * of_image).sum(0))
    assert np.all(bits > exact)
    own = np.asarray(inner.read({}, given))
    rows = [int(np.flatnonzero((every == row).all(1))[0]) for row in own]
    np.testing.assert_allclose(bits, nats[rows] / np.log(2.0), rtol=1e-5)


TREE = np.array([[0.8, 0.15, 0.05], [0.1, 0.6, 0.3], [0.3, 0.1, 0.6]])
"""From a token to each of the four below it; the first is drawn uniformly."""


def trees(count, seed):
    """(Tokens i[count,21] of sides 1, 2 and 4, nats f[count] that they cost by their own law)."""
    generator = np.random.default_rng(seed)
    level, nats = generator.integers(3, size=(count, 1, 1)), np.full(count, np.log(3.0))
    found = [level.reshape(count, -1)]
    for _ in range(2):
        above = level.repeat(2, axis=1).repeat(2, axis=2)
        level = (generator.uniform(size=above.shape)[..., None] > np.cumsum(TREE, axis=1)[above]).sum(-1)
        nats = nats - np.log(TREE)[above, level].sum((1, 2))
        found.append(level.reshape(count, -1))
    return np.concatenate(found, axis=1), nats


def test_likelihood_approaches_a_known_tree_s_entropy_from_above():
    """Bits a token on held-out trees, after 0, 100 and 400 steps; below the tree's own only by chance."""
    scales = Scales(
        sides=(1, 2, 4),
        channels=3,
        token=lambda params, r: jnp.argmax(r, axis=-1),
        vectors=lambda params, tokens, k: jax.nn.one_hot(tokens, 3).repeat(4 >> k, axis=1).repeat(4 >> k, axis=2),
    )
    spec = TokenSpec(grid=(4, 4, 1), vocabulary=3, channels=3, num_classes=0, scales=scales.sides)
    it = VAR(network=sequence.build("network", "var(width=16,depth=1,heads=2)", spec), tokens=spec, scales=scales)
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, 400))
    train = jnp.asarray(trees(64 * 400, seed=1)[0], jnp.int32).reshape(400, 64, 21)
    held_out, own = trees(2000, seed=2)

    @jax.jit
    def learn(state, batches):
        def step(state, given):
            params, memory = state
            loss = lambda params: jnp.mean(it.losses(params, given, None, None, None, 0.0)[0])
            with jax.numpy_dtype_promotion("standard"):
                update, memory = optimizer.update(jax.grad(loss)(params), memory)
            return (optax.apply_updates(params, update), memory), None

        return jax.lax.scan(step, state, batches)[0]

    params = jax.jit(it.network.init)(jax.random.key(0))
    state, nats, gaps = (params, optimizer.init(params)), jax.jit(it.nats), []
    for begin, end in ((0, 0), (0, 100), (100, 400)):
        state = learn(state, train[begin:end]) if end else state
        gap = (np.asarray(nats(state[0], jnp.asarray(held_out, jnp.int32), None)) - own) / (21.0 * np.log(2.0))
        gaps.append(gap.mean())
    assert gaps[0] > 0.3
    assert gaps[0] > gaps[1] > gaps[2]
    assert -3.0 * gap.std() / np.sqrt(len(gap)) < gaps[2] < 0.02


def test_the_loss_is_the_mean_over_all_tokens_of_all_scales():
    """Smoothed or not, and with the frozen tokenizer's parameters from the context."""
    over = "workdir:codes"
    it, params = family(over, label_smoothing=0.1, label_dropout=0.0), weights(over)
    index = jnp.arange(3, dtype=jnp.int32)
    batch = {"image": normals(3, 4, 4, 1), "label": LABEL, "index": index}
    ctx = Context(
        batch=batch,
        key=jax.random.key(0),
        common=jax.random.key(0),
        step=jnp.int32(0),
        extra={},
        ema={},
        frozen={"tokenizer": {"params": frozen()}},
    )
    own = {"transformer": jax.tree.map(jnp.asarray, params["transformer"])}
    loss, aux = jax.jit(lambda params: it.players[0].loss(params, ctx))(own)
    given = codes().encode(frozen(), batch["image"], None)
    logits = whole(over)(own["transformer"], given, LABEL)
    np.testing.assert_allclose(loss, jnp.mean(cross_entropy(logits, given, 0.1)), rtol=1e-5)
    bits = jnp.mean(cross_entropy(logits, given)) / np.log(2.0)
    np.testing.assert_allclose(aux.metrics["bits_per_token"], bits, rtol=1e-5)
    assert len(np.unique(given)) > 2


# ------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"steps": 4}, r"sample.steps = 4"),
        ({"choice_temperature": 1.0}, r"sample.choice_temperature = 1.0"),
        ({"guidance_schedule": "cosine"}, r"sample.guidance_schedule = 'cosine'"),
    ],
)
def test_impossible_options_are_refused_by_name(section, says):
    with pytest.raises(UserError, match=says):
        family().sampling(section)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"tokenizer": "pixels"}, r"family.network.*tokens of several scales"),
        ({"network": "gpt"}, r"family.network.*one grid of tokens"),
        ({"network": "maskgit", "decoding": "maskgit"}, r"family.network.*one grid of tokens"),
        ({"decoding": "autoregressive"}, r"family.decoding.*needs a causal network"),
        ({"decoding": "var(sides=3)"}, r"family.decoding.*no option 'sides'"),
        ({"decoding": "var(scales=3)"}, r"family.decoding.*no option 'scales'"),
    ],
)
def test_rows_that_do_not_fit_are_refused_by_name(fields, says):
    section = {"name": "transformer", "network": NETWORK, "tokenizer": "pyramid", "decoding": "var", **fields}
    with pytest.raises(UserError, match=says):
        families.build(section, SPEC, "float32")


def test_a_network_of_another_kind_is_refused():
    section = {"name": "transformer", "network": "gpt(width=16,depth=1,heads=2)", "decoding": "var"}
    with pytest.raises(UserError, match=r"family.decoding.*needs a network of scales"):
        families.build(section, SPEC, "float32")


# ------------------------------------------------------------------------------------------ what it costs


@pytest.mark.parametrize(("section", "runs"), [({}, 1), ({"guidance": 2.0}, 2)])
def test_costs_are_counted_as_they_happen(section, runs):
    """All scales of an image are one run. FLOPs by hand: of 21 tokens each product with weights, and attention's.

    Modulations are of the class alone.
    """
    it, given = family(), family().sampling(section)
    asked = cost.evaluations(it, SPEC, weights(), given)
    assert asked == runs
    block = 4 * 16 * 16 + 2 * 64 * 16 + 2 * 16 * 21
    by_hand = 21 * (block + 9 * 16) + 6 * 16 * 16 + 2 * 16 * 16
    flops = cost.sampling_flops(it, SPEC, weights(), given, 10, asked)
    assert flops == pytest.approx(2 * runs * by_hand, rel=0.1)
