"""The transformer family: likelihood where the entropy is known, draws beside NumPy's, and what stays masked."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import families, rng
from diffusion_jax.errors import UserError
from diffusion_jax.evaluation import cost
from diffusion_jax.families import transformer_draws, transformer_maskgit
from diffusion_jax.families.transformer_draws import Shown
from diffusion_jax.settings import TrainSettings
from diffusion_jax.training.step import Trainer
from diffusion_jax.types import Context, ImageSpec
from tests.arrays import filled, normals

pytestmark = pytest.mark.usefixtures("quick_compilation")

SPEC = ImageSpec(size=4, channels=1, num_classes=2, levels=5)
SIZES = "width=16,depth=1,heads=2"
GPT = f"gpt({SIZES},multiple_of=1)"
MASKGIT = f"maskgit({SIZES})"


@functools.cache
def family(decoding="autoregressive", spec=SPEC, **fields):
    network = {"autoregressive": GPT, "maskgit": MASKGIT}[decoding]
    section = {"name": "transformer", "network": network, "decoding": decoding, **fields}
    return families.build(section, spec, "float32")


@functools.cache
def model(decoding="autoregressive"):
    """What is behind the family's functions."""
    return family(decoding).generate.__self__


@functools.cache
def weights(decoding="autoregressive"):
    return filled(lambda key: family(decoding).init(key)[0])


def keys(count, seed=0):
    return rng.example_keys(jax.random.key(seed), jnp.arange(count))


def options(decoding="autoregressive", **changes):
    return family(decoding).sampling(changes)


@functools.cache
def generate(decoding="autoregressive"):
    return jax.jit(family(decoding).generate)


def tokens(decoding="autoregressive", count=3, seed=0, params=None, **changes):
    """Of labels 0, 1, 0, ..."""
    params = weights(decoding) if params is None else params
    shown = {"label": jnp.arange(count, dtype=jnp.int32) % 2}
    images = generate(decoding)(params, keys(count, seed), shown, options(decoding, **changes))
    return np.asarray(model(decoding).read({}, {"image": images}))


# ------------------------------------------------------------------------------------------ draws


def kept_by_numpy(logits, k, p):
    """The tokens that are left: one by one from the likeliest, until there are k, or until they hold p of k's mass."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])[: k or None]
    mass = np.exp(logits[order] - logits.max()).astype(np.float64)
    mass /= mass.sum()
    chosen, total = set(), 0.0
    for i, m in zip(order, mass, strict=True):
        if total >= p:
            break
        chosen.add(i)
        total += m
    return chosen


@pytest.mark.parametrize("k", [0, 1, 3, 11, 40])
@pytest.mark.parametrize("p", [0.01, 0.4, 0.9, 1.0])
def test_top_k_and_top_p_keep_the_sets_that_numpy_keeps(k, p):
    logits = 3.0 * normals(50, 11)
    kept = np.asarray(transformer_draws.kept(logits, jnp.int32(k), jnp.float32(p)))
    for row, mask in zip(np.asarray(logits), kept, strict=True):
        assert set(np.flatnonzero(mask)) == kept_by_numpy(row, k, p)


def test_of_equal_logits_as_many_as_asked_for_are_kept():
    kept = transformer_draws.kept(jnp.zeros((1, 6)), jnp.int32(2), jnp.float32(1.0))
    np.testing.assert_array_equal(kept, [[True, True, False, False, False, False]])


@pytest.mark.parametrize(("temperature", "k", "p"), [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 3, 1.0), (1.5, 0, 0.8)])
def test_tokens_are_drawn_by_the_softmax_of_those_that_are_kept(temperature, k, p):
    """20,000 draws: each token's share is its probability, to 4 standard errors."""
    logits = np.array([2.0, 1.0, 0.5, 0.0, -1.0], np.float32)
    count = 20_000
    given = options(temperature=temperature, top_k=k, top_p=p)
    drawn = transformer_draws.draw(keys(count), jnp.broadcast_to(jnp.asarray(logits), (count, 5)), given)
    chosen = sorted(kept_by_numpy(logits / temperature, k, p))
    expected = np.zeros(5)
    expected[chosen] = np.exp(logits[chosen] / temperature)
    expected /= expected.sum()
    share = np.bincount(drawn, minlength=5) / count
    np.testing.assert_allclose(share, expected, atol=4.0 * np.sqrt(0.25 / count))
    assert np.all(share[expected == 0.0] == 0.0)


def test_smoothed_cross_entropy_by_hand():
    """(1 - s) times the token's, s times the mean over all tokens."""
    logits = np.array([[1.0, -2.0, 0.5]])
    p = np.exp(logits) / np.exp(logits).sum()
    expected = -0.9 * np.log(p[0, 1]) - 0.1 * np.log(p).mean()
    given = jnp.asarray(logits, jnp.float32), jnp.int32([1])
    np.testing.assert_allclose(transformer_draws.cross_entropy(*given, 0.1), [expected], rtol=1e-6)
    np.testing.assert_allclose(transformer_draws.cross_entropy(*given), [-np.log(p[0, 1])], rtol=1e-6)


# ------------------------------------------------------------------------------------------ token after token


def greedy(params, label, weight=None):
    """The likeliest token after each beginning, by the whole pass: no cache."""
    apply = jax.jit(model().decoding.network.apply)
    made = jnp.zeros((len(label), 16), jnp.int32)
    for t in range(16):
        logits = apply(params["transformer"], made, label, None)[:, t]
        if weight is not None:
            without = apply(params["transformer"], made, jnp.full_like(label, 2), None)[:, t]
            logits = without + weight * (logits - without)
        made = made.at[:, t].set(jnp.argmax(logits, axis=-1))
    return np.asarray(made)


@pytest.mark.parametrize("weight", [None, 3.0])
def test_at_temperature_0_the_cache_changes_no_token(weight):
    made = tokens(temperature=0.0, guidance=1.0 if weight is None else weight)
    np.testing.assert_array_equal(made, greedy(weights(), jnp.int32([0, 1, 0]), weight))
    assert len(np.unique(made)) > 1


@pytest.mark.parametrize("decoding", ["autoregressive", "maskgit"])
def test_guidance_1_is_the_conditional_model_to_the_bit(decoding):
    """What is said of "no label" may be anything: here no number at all."""
    it, params = model(decoding), weights(decoding)["transformer"]
    table = "label" if decoding == "autoregressive" else "word"
    spoilt = params | {table: jnp.asarray(params[table]).at[-1].set(jnp.nan)}
    plain = jax.jit(lambda p: it.decoding.generate(p, keys(3), Shown(label=jnp.int32([0, 1, 0])), options(decoding)))
    np.testing.assert_array_equal(tokens(decoding, params={"transformer": spoilt}), plain(params))
    assert np.any(tokens(decoding, guidance=4.0) != plain(params))


@pytest.mark.parametrize("decoding", ["autoregressive", "maskgit"])
def test_guidance_0_does_not_look_at_the_label(decoding):
    shown = lambda label: {"label": jnp.full(3, label, jnp.int32)}
    made = [generate(decoding)(weights(decoding), keys(3), shown(k), options(decoding, guidance=0.0)) for k in (0, 1)]
    np.testing.assert_array_equal(*made)


CHAIN = np.array([[0.8, 0.15, 0.05], [0.1, 0.6, 0.3], [0.3, 0.1, 0.6]])
"""From a token (row) to the next one in raster order (column)."""


def chains(count, seed):
    """Tokens i[count,16] of the stationary chain, and bits a token f[count] that they cost by its own law."""
    generator = np.random.default_rng(seed)
    values, vectors = np.linalg.eig(CHAIN.T)
    stationary = np.real(vectors[:, np.argmax(np.real(values))])
    stationary /= stationary.sum()
    made = [generator.choice(3, size=count, p=stationary)]
    for _ in range(15):
        u = generator.uniform(size=count)
        made.append((u[:, None] > np.cumsum(CHAIN, axis=1)[made[-1]]).sum(1))
    made = np.stack(made, axis=1)
    nats = np.log(stationary)[made[:, 0]] + np.log(CHAIN)[made[:, :-1], made[:, 1:]].sum(1)
    return made, -nats / (16.0 * np.log(2.0))


def as_batch(made):
    images = jnp.asarray(made, jnp.float32).reshape(-1, 4, 4, 1) - 1.0
    return {"image": images, "index": jnp.arange(len(images), dtype=jnp.int32)}


def test_likelihood_approaches_a_markov_chain_s_entropy_from_above():
    """On held-out sequences, after 0, 100 and 400 steps; below the chain's own bits only by chance."""
    it = family(spec=ImageSpec(size=4, channels=1, num_classes=0, levels=3), network=f"gpt({SIZES},multiple_of=1)")
    settings = TrainSettings(
        steps=400, learning_rate=1e-2, learning_rate_schedule="cosine_decay_schedule", batch_size=64, ema={}
    )
    trainer = Trainer(it, settings, seed=0)
    train = jnp.asarray(chains(64 * 400, seed=1)[0].reshape(400, 64, 16))
    held_out, own = chains(2000, seed=2)

    @jax.jit
    def learn(state, made):
        return jax.lax.scan(lambda state, made: (trainer.step(state, as_batch(made), {})[0], None), state, made)[0]

    state, nll, gaps = jax.jit(trainer.init)(), jax.jit(it.nll), []
    for begin, end in ((0, 0), (0, 100), (100, 400)):
        state = learn(state, train[begin:end]) if end else state
        gap = np.asarray(nll(state.params, as_batch(held_out), jax.random.key(0))) - own
        gaps.append(gap.mean())
    assert gaps[0] > 0.3
    assert gaps[0] > gaps[1] > gaps[2]
    assert -3.0 * gap.std() / np.sqrt(len(gap)) < gaps[2] < 0.02


def test_the_likelihood_of_all_images_is_1():
    """Every image of 2x2 pixels and 3 levels: the probabilities add up."""
    spec = ImageSpec(size=2, channels=1, num_classes=0, levels=3)
    it = family(spec=spec)
    params = filled(lambda key: it.init(key)[0])
    every = np.stack(np.meshgrid(*[np.arange(3)] * 4), axis=-1).reshape(-1, 2, 2, 1)
    given = {"image": jnp.asarray(every - 1.0, jnp.float32), "index": jnp.arange(81, dtype=jnp.int32)}
    bits = np.asarray(jax.jit(it.nll)(params, given, jax.random.key(0)), np.float64)
    np.testing.assert_allclose(np.sum(2.0 ** (-4.0 * bits)), 1.0, rtol=1e-5)
    assert bits.std() > 0.01


# ------------------------------------------------------------------------------------------ masked tokens

PUBLISHED = [251, 236, 212, 181, 142, 97, 49, 0]
"""Of 256 tokens, after each of 8 steps: floor(256 cos(pi s / 16))."""


def test_as_many_tokens_stay_masked_as_published():
    """Observed: the loop of 8 steps, stopped after each; and tokens that stand stay what they are."""
    spec = ImageSpec(size=16, channels=1, num_classes=0, levels=7)
    whole = family("maskgit", spec, network="maskgit(width=8,depth=1,heads=1)")
    given, it = whole.sampling({"steps": 8}), whole.generate.__self__.decoding
    params = filled(lambda key: whole.init(key)[0])["transformer"]
    run = jax.jit(lambda options: it.generate(params, keys(2), Shown(label=None), options))
    before = np.full((2, 256), 7)
    for s, count in enumerate(PUBLISHED):
        stopped = replace(given, steps=jnp.int32(s + 1), choice_temperature=jnp.float32(0.0))
        made = np.asarray(run(stopped))
        np.testing.assert_array_equal((made == 7).sum(1), [count, count])
        np.testing.assert_array_equal(made[before != 7], before[before != 7])
        before = made


@pytest.mark.parametrize(("steps", "length"), [(8, 256), (3, 12), (16, 16), (1, 5), (12, 64)])
def test_shares_are_the_cosine_s(steps, length):
    left = transformer_maskgit.still_masked(
        jnp.full(length, length), jnp.asarray(transformer_maskgit.shares(steps, length))
    )
    whole = [int(np.floor(length * np.cos(np.pi * s / (2 * steps)) + 1e-9)) for s in range(1, steps)] + [0]
    np.testing.assert_array_equal(left, whole + [0] * (length - steps))


def test_a_cosine_s_share_is_hidden_in_training():
    """Of 16 tokens ceil(16 cos(pi r / 2)), r uniform: their distribution, and every place is hidden alike."""
    count = 40_000
    hidden = np.asarray(jax.jit(model("maskgit").decoding.hidden)(keys(count)))
    r = (np.arange(1_000_000) + 0.5) / 1_000_000
    expected = np.bincount(np.ceil(16 * np.cos(0.5 * np.pi * r)).astype(int), minlength=17) / len(r)
    found = np.bincount(hidden.sum(1), minlength=17) / count
    np.testing.assert_allclose(found, expected, atol=4.0 * np.sqrt(0.25 / count))
    np.testing.assert_allclose(hidden.mean(0), hidden.mean(), atol=4.0 * np.sqrt(0.25 / count))


def test_hidden_tokens_alone_count_in_the_loss():
    """By NumPy: their nats over 2 / pi times the number of tokens, whatever the network says of the others."""
    it, params = model("maskgit").decoding, weights("maskgit")["transformer"]
    given, label = jnp.asarray(np.random.default_rng(0).integers(5, size=(6, 16)), jnp.int32), jnp.zeros(6, jnp.int32)
    hidden = np.asarray(it.hidden(keys(6)))
    logits = jax.jit(it.network.apply)(params, jnp.where(hidden, 5, given), label, None)
    logits = np.asarray(logits, np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nats = -np.take_along_axis(log_p, np.asarray(given)[..., None], -1)[..., 0]
    losses, _ = jax.jit(lambda params: it.losses(params, given, label, keys(6), None, 0.0))(params)
    np.testing.assert_allclose(losses, (nats * hidden).sum(1) / (16 * 2 / np.pi), rtol=1e-5)


def test_an_image_is_filled_in_around_what_is_known():
    """Known pixels come back to the bit and count; the others are made, by the key and under the label."""
    it = family("maskgit")
    image = jnp.asarray(np.random.default_rng(0).integers(5, size=(3, 4, 4, 1)) / 2.0 - 1.0, jnp.float32)
    known = jnp.asarray(np.arange(16).reshape(1, 4, 4, 1) < 7).repeat(3, axis=0)
    inpaint = jax.jit(it.edits["inpaint"])

    def made(image=image, label=0, seed=0):
        inputs = {"image": image, "known": known, "label": jnp.full(3, label, jnp.int32)}
        return np.asarray(inpaint(weights("maskgit"), keys(3, seed), inputs, options("maskgit")))

    whole = made()
    np.testing.assert_array_equal(whole[np.asarray(known)], np.asarray(image)[np.asarray(known)])
    np.testing.assert_array_equal(whole, made(image=jnp.where(known, image, 1.0)))
    assert np.any(whole != made(seed=1))
    assert np.any(whole != made(label=1))
    assert np.any((whole != made(image=-image))[~np.asarray(known)])


# ------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("decoding", "section", "says"),
    [
        ("autoregressive", {"steps": 4}, r"sample.steps = 4: Autoregressive decoding does not read it"),
        ("autoregressive", {"choice_temperature": 1.0}, r"sample.choice_temperature = 1.0"),
        ("autoregressive", {"temperature": -1.0}, r"sample.temperature = -1.0"),
        ("autoregressive", {"top_p": 0.0}, r"sample.top_p = 0.0"),
        ("maskgit", {"steps": 17}, r"sample.steps = 17: must be at most 16"),
        ("maskgit", {"choice_temperature": -2.0}, r"sample.choice_temperature = -2.0"),
        ("maskgit", {"solver": "heun"}, r"sample.solver"),
    ],
)
def test_impossible_options_are_refused_by_name(decoding, section, says):
    with pytest.raises(UserError, match=says):
        family(decoding).sampling(section)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"network": MASKGIT}, r"family.decoding.*needs a causal network"),
        ({"network": GPT, "decoding": "maskgit"}, r"family.decoding.*needs a network of masked tokens"),
        ({"decoding": "beam"}, r"family.decoding = 'beam'"),
        ({"tokenizer": "pixel"}, r"family.tokenizer = 'pixel'"),
        ({"label_smoothing": 1.0}, r"family.label_smoothing = 1.0"),
    ],
)
def test_rows_that_do_not_fit_are_refused_by_name(fields, says):
    with pytest.raises(UserError, match=says):
        families.build({"name": "transformer", "network": GPT, **fields}, SPEC, "float32")


def test_guidance_without_hidden_labels_is_refused():
    with pytest.raises(UserError, match=r"sample.guidance = 2.0"):
        family(label_dropout=0.0).sampling({"guidance": 2.0})


def test_a_hidden_label_is_the_one_after_the_last():
    """With all labels hidden (nearly), what the labels are changes no loss."""
    it = family(label_dropout=0.999999)

    @jax.jit
    def loss(label):
        index = jnp.arange(4, dtype=jnp.int32)
        given = {"image": jnp.zeros((4, 4, 4, 1)), "label": jnp.full_like(index, label), "index": index}
        key = jax.random.key(0)
        ctx = Context(batch=given, key=key, common=key, step=jnp.int32(0), extra={}, ema={}, frozen={})
        return it.players[0].loss(jax.tree.map(jnp.asarray, weights()), ctx)[0]

    assert loss(jnp.int32(0)) == loss(jnp.int32(1))


# ------------------------------------------------------------------------------------------ what it costs


@pytest.mark.parametrize(
    ("decoding", "section", "runs", "tokens_a_run"),
    [("autoregressive", {}, 16, 1), ("autoregressive", {"guidance": 2.0}, 32, 1), ("maskgit", {"steps": 6}, 6, 17)],
)
def test_costs_are_counted_as_they_happen(decoding, section, runs, tokens_a_run):
    """FLOPs by hand: products with weights, of each token that goes through the network, and attention's."""
    it, given = family(decoding), options(decoding, **section)
    asked = cost.evaluations(it, SPEC, weights(decoding), given)
    assert asked == runs
    seen = 16 if decoding == "autoregressive" else 17  # the cache's length; MaskGIT sees the class, too
    hidden = 3 * 42 * 16 if decoding == "autoregressive" else 2 * 64 * 16  # SwiGLU's and the plain MLP's three and two
    block = 4 * 16 * 16 + hidden + 2 * 16 * seen
    head = 5 * 16 if decoding == "autoregressive" else (16 * 16 + 5 * 16) * 16 / 17  # the class has none
    by_hand = tokens_a_run * (block + head)
    flops = cost.sampling_flops(it, SPEC, weights(decoding), given, 10, asked)
    assert flops == pytest.approx(2 * runs * by_hand, rel=0.1)
