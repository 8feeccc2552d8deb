"""Transformers over tokens: published counts, who sees whom, and steps with a cache beside the whole pass."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import tree
from diffusion_jax.errors import UserError
from diffusion_jax.networks import sequence
from diffusion_jax.networks.presets import SEQUENCES
from diffusion_jax.types import TokenSpec
from tests.arrays import filled, normals

pytestmark = pytest.mark.usefixtures("quick_compilation")

PUBLISHED = {
    # FoundationVision/LlamaGen, autoregressive/models/gpt.py: "111M, 343M, 775M, 1.4B, 3.1B" in its README
    "llamagen-b": 110_888_448,
    "llamagen-l": 342_910_976,
    "llamagen-xl": 774_699_520,
    "llamagen-xxl": 1_410_972_672,
    "llamagen-3b": 3_096_659_200,
    # google-research/maskgit: 1,024 codes, 1,000 classes and the mask in one table
    "maskgit-256": 172_457_193,
    # FoundationVision/VAR: "310M, 600M, 1.0B, 2.0B" in its README; all that is trained, no buffers
    "var-d16": 310_283_520,
    "var-d20": 600_917_136,
    "var-d24": 1_033_399_360,
    "var-d30": 2_010_020_356,
    # LTH14/mar: "208M, 479M, 943M" in its README
    "mar-b": 207_924_768,
    "mar-l": 478_326_304,
    "mar-h": 942_403_104,
}


@pytest.mark.parametrize(("name", "count"), PUBLISHED.items())
def test_published_counts(name, count):
    network = sequence.build("network", name, SEQUENCES[name].tokens)
    assert tree.count(jax.eval_shape(network.init, jax.random.key(0))) == count


def test_var_has_680_tokens():
    network = sequence.build("network", "var-d16", SEQUENCES["var-d16"].tokens)
    assert network.begin(1).pairs.shape == (16, 2, 1, 680, 16, 64)
    assert network.example[0].shape == (1, 679, 32)


# ---------------------------------------------------------------------------------------------- small ones

PIXELS = TokenSpec(grid=(3, 3, 1), vocabulary=5, channels=0, num_classes=2)
COLOURS = TokenSpec(grid=(2, 2, 3), vocabulary=5, channels=0, num_classes=0)
CODES = TokenSpec(grid=(3, 3, 1), vocabulary=5, channels=4, num_classes=2, scales=(1, 2, 3))
LATENTS = TokenSpec(grid=(3, 3, 1), vocabulary=0, channels=4, num_classes=2)

SIZES = "width=16,depth=2,heads=2"
NETWORKS = {
    "gpt": (f"gpt({SIZES},multiple_of=1)", PIXELS),
    "gpt-scan": (f"gpt({SIZES},multiple_of=1,scan=True)", PIXELS),
    "gpt-colours": (f"gpt({SIZES},multiple_of=1)", COLOURS),
    "maskgit": (f"maskgit({SIZES})", PIXELS),
    "var": (f"var({SIZES})", CODES),
    "var-shared": (f"var({SIZES},shared_modulation=True,scan=True)", CODES),
    "mar": (f"mar({SIZES},buffer=3,mlp_width=8,mlp_depth=2)", LATENTS),
}


@functools.cache
def network(name):
    text, tokens = NETWORKS[name]
    return sequence.build("network", text, tokens)


@functools.cache
def params(name):
    return filled(network(name).init)


@functools.cache
def apply(name):
    return jax.jit(network(name).apply)


def tokens(name, count=3, seed=0):
    spec = NETWORKS[name][1]
    drawn = np.random.default_rng(seed).integers(spec.vocabulary, size=(count, spec.length))
    return jnp.asarray(drawn, jnp.int32)


def label(name, count=3):
    classes = NETWORKS[name][1].num_classes
    return jnp.arange(count, dtype=jnp.int32) % (classes + 1) if classes else None


GPTS = [name for name in NETWORKS if name.startswith("gpt")]
VARS = [name for name in NETWORKS if name.startswith("var")]


@pytest.mark.parametrize("name", GPTS)
def test_raster_causality(name):
    """Another token t changes no logit of tokens 0, ..., t, and some of every later token."""
    given = tokens(name)
    before = np.asarray(apply(name)(params(name), given, label(name), None))
    for t in range(given.shape[1]):
        changed = given.at[:, t].set((given[:, t] + 1) % 5)
        after = np.asarray(apply(name)(params(name), changed, label(name), None))
        np.testing.assert_array_equal(after[:, : t + 1], before[:, : t + 1])
        assert np.all(np.abs(after - before)[:, t + 1 :].max(-1) > 1e-6)


@pytest.mark.parametrize("name", GPTS)
def test_a_token_a_step_gives_the_logits_of_the_whole_pass(name):
    given, it = tokens(name), network(name)
    whole = apply(name)(params(name), given, label(name), None)
    step, cache, token = jax.jit(it.step), it.begin(3), jnp.full(3, 4, jnp.int32)  # the first step does not look at it
    for t in range(given.shape[1]):
        logits, cache = step(params(name), token, label(name), cache)
        np.testing.assert_allclose(logits, whole[:, t], atol=1e-5)
        token = given[:, t]
    assert int(cache.position) == given.shape[1]


def scale_of_each():
    """Of each of VAR's 14 tokens."""
    return np.repeat([0, 1, 2], [1, 4, 9])


@pytest.mark.parametrize("name", VARS)
def test_causality_by_scale(name):
    """Another input in one place of scale k changes logits of the whole scale and of later ones, of no earlier one."""
    vectors = normals(3, 13, 4)
    before = np.asarray(apply(name)(params(name), vectors, label(name), None))
    assert before.shape == (3, 14, 5)
    for place in range(1, 14):
        after = np.asarray(apply(name)(params(name), vectors.at[:, place - 1].add(1.0), label(name), None))
        earlier = scale_of_each() < scale_of_each()[place]
        np.testing.assert_array_equal(after[:, earlier], before[:, earlier])
        assert np.all(np.abs(after - before)[:, ~earlier].max(-1) > 1e-6)


@pytest.mark.parametrize("name", VARS)
def test_a_scale_a_step_gives_the_logits_of_the_whole_pass(name):
    it, vectors = network(name), normals(3, 13, 4)
    whole = apply(name)(params(name), vectors, label(name), None)
    cache, padded = it.begin(3), jnp.concatenate([jnp.full((3, 1, 4), 7.0), vectors], axis=1)
    step = jax.jit(it.step)
    for k in range(3):
        logits, cache = step(params(name), padded[:, scale_of_each() == k], label(name), cache)
        np.testing.assert_allclose(logits, whole[:, scale_of_each() == k], atol=1e-5)


def test_masked_latents_are_not_seen():
    """What stands in the masked places changes no vector; what stands in one that is known changes all of them."""
    it, latents = network("mar"), normals(3, 9, 4)
    masked = jnp.asarray(np.random.default_rng(0).permuted(np.tile(np.arange(9) < 5, (3, 1)), axis=1))
    encode = jax.jit(it.encode)
    before = np.asarray(encode(params("mar"), latents, masked, label("mar"), None))
    noise = 9.0 * normals(3, 9, 4, seed=1)
    hidden = encode(params("mar"), jnp.where(masked[..., None], noise, latents), masked, label("mar"), None)
    np.testing.assert_array_equal(hidden, before)
    shown = encode(params("mar"), jnp.where(masked[..., None], latents, noise), masked, label("mar"), None)
    assert np.all(np.abs(shown - before).max(-1) > 1e-6)


def test_every_token_sees_every_other_without_a_mask():
    given = tokens("maskgit")
    before = apply("maskgit")(params("maskgit"), given, label("maskgit"), None)
    for t in (0, 4, 8):
        changed = given.at[:, t].set(5)  # the mask
        after = apply("maskgit")(params("maskgit"), changed, label("maskgit"), None)
        assert np.all(np.abs(after - before).max(-1) > 1e-6)


def test_a_denoiser_knows_its_own_place_alone():
    it = network("mar")
    x, time, z = normals(2, 9, 4), jnp.full((2, 9), 0.3), normals(2, 9, 16, seed=1)
    denoise = jax.jit(it.denoise)
    before = np.asarray(denoise(params("mar"), x, time, z))
    assert before.shape == (2, 9, 8)
    after = np.asarray(denoise(params("mar"), x.at[0, 3].add(1.0), time, z.at[1, 5].add(1.0)))
    moved = np.abs(after - before).max(-1) > 1e-6
    assert [tuple(place) for place in np.argwhere(moved)] == [(0, 3), (1, 5)]


@pytest.mark.parametrize("name", ["gpt", "maskgit", "mar"])
def test_labels_count(name):
    given = [normals(3, *s.shape[1:]) if s.dtype == jnp.float32 else None for s in network(name).example]
    given = [jnp.zeros((3, 9), bool) if x is None else x for x in given]
    if name != "mar":
        given[0] = tokens(name)
    place = 2 if name == "mar" else 1
    outputs = []
    for which in range(3):
        given[place] = jnp.full(3, which, jnp.int32)
        outputs.append(np.asarray(apply(name)(params(name), *given, *([] if name == "mar" else [None]))))
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert np.abs(outputs[a] - outputs[b]).max() > 1e-5


@pytest.mark.parametrize("name", ["gpt", "maskgit", "var"])
def test_no_label_is_the_null_label(name):
    """Where there are classes, the one after the last: not the first."""
    given = normals(3, 13, 4) if name == "var" else tokens(name)
    none = apply(name)(params(name), given, None, None)
    np.testing.assert_array_equal(none, apply(name)(params(name), given, jnp.full(3, 2, jnp.int32), None))
    assert np.abs(none - apply(name)(params(name), given, jnp.zeros(3, jnp.int32), None)).max() > 1e-5


def test_without_a_null_label_none_is_a_token_of_zeros():
    """As many rows less, and labels from the first to the last still differ from it."""
    text, spec = NETWORKS["maskgit"]
    without = sequence.build("network", text[:-1] + ",null_label=False)", spec)
    mine = filled(without.init)
    assert tree.count(params("maskgit")) - tree.count(mine) == 16 + 1
    run = jax.jit(without.apply)
    none = run(mine, tokens("maskgit"), jnp.full(3, 2, jnp.int32), None)
    assert np.all(np.isfinite(none))
    other = jax.tree.map(lambda leaf: leaf, mine)
    other["word"] = jnp.asarray(mine["word"]).at[-2:].add(1.0)  # of the two classes
    np.testing.assert_array_equal(run(other, tokens("maskgit"), jnp.full(3, 2, jnp.int32), None), none)
    assert np.abs(run(other, tokens("maskgit"), jnp.full(3, 1, jnp.int32), None) - none).max() > 1e-3


@pytest.mark.parametrize("name", ["gpt", "maskgit", "var"])
def test_dropout_is_drawn_by_each_example_s_own_key(name):
    text, spec = NETWORKS[name]
    it = sequence.build("network", text[:-1] + ",dropout=0.3)", spec)
    inputs = normals(3, 13, 4) if name == "var" else tokens(name)
    run = jax.jit(it.apply)
    keys = jax.random.split(jax.random.key(0), 3)
    whole = np.asarray(run(params(name), inputs, label(name), keys))
    order = np.array([2, 0, 1])
    turned = run(params(name), inputs[order], label(name)[order], keys[order])
    np.testing.assert_allclose(turned, whole[order], atol=1e-5)
    plain = run(params(name), inputs, label(name), None)
    np.testing.assert_allclose(plain, apply(name)(params(name), inputs, label(name), None), atol=1e-6)
    assert np.abs(whole - plain).max() > 1e-2


@pytest.mark.parametrize("name", ["gpt", "var"])
def test_bfloat16_is_near_float32(name):
    text, spec = NETWORKS[name]
    half = sequence.build("network", text, spec, "bfloat16")
    inputs = normals(3, 13, 4) if name == "var" else tokens(name)
    exact = np.asarray(apply(name)(params(name), inputs, label(name), None))
    near = np.asarray(jax.jit(half.apply)(params(name), inputs, label(name), None))
    assert near.dtype == np.float32
    assert np.abs(near - exact).max() < 0.05 * np.abs(exact).max()
    assert half.begin(1).pairs.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("text", "spec", "says"),
    [
        ("gtp", PIXELS, r"network = 'gtp'.*did you mean 'gpt'"),
        ("gpt(width=18,heads=3)", PIXELS, "divisible by 4"),
        ("gpt(depth=0)", PIXELS, "depth must be at least 1"),
        ("gpt", LATENTS, "continuous latents"),
        ("maskgit", LATENTS, "continuous latents"),
        ("mar", PIXELS, "discrete tokens"),
        ("gpt", CODES, "one grid of tokens"),
        ("maskgit", CODES, "one grid of tokens"),
        ("var", PIXELS, "tokens of several scales"),
    ],
)
def test_impossible_networks_are_refused_by_name(text, spec, says):
    with pytest.raises(UserError, match=says):
        sequence.build("network", text, spec)
