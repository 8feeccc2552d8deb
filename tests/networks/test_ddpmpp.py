"""DDPM++ and NCSN++: filters, embeddings, what they begin as, and augmentation conditioning."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import signal, stats

from diffusion_jax import networks
from diffusion_jax.errors import UserError
from diffusion_jax.networks import ddpmpp
from diffusion_jax.types import ImageSpec

SPEC = ImageSpec(size=8, channels=3, num_classes=5)
SMALL = "ddpmpp(channels=32,multipliers=(1,),blocks=1,attention=(),augment=9)"
FILTERS = [(1, 1), (1, 3, 3, 1), (1, 5, 10, 10, 5, 1)]


pytestmark = pytest.mark.usefixtures("quick_compilation")


def image(height=6, width=8, channels=2, seed=0):
    return np.random.default_rng(seed).normal(size=(1, height, width, channels)).astype(np.float32)


# ------------------------------------------------------------------------------------------ filters


@pytest.mark.parametrize("taps", FILTERS)
def test_halving_and_doubling_are_scipys_upfirdn(taps):
    """Of the middle: the K - 2 results more than twice, or half, the pixels are cut off, the same at both ends."""
    x, kernel = image(), np.array(taps) / sum(taps)
    down, up = x, x
    for axis in (1, 2):
        middle = slice(len(taps) // 2, len(taps) // 2 + down.shape[axis])
        down = np.moveaxis(np.moveaxis(signal.upfirdn(kernel, down, axis=axis), axis, 0)[middle][::2], 0, axis)
        middle = slice(len(taps) // 2 - 1, len(taps) // 2 - 1 + 2 * up.shape[axis])
        up = np.moveaxis(np.moveaxis(signal.upfirdn(2.0 * kernel, up, up=2, axis=axis), axis, 0)[middle], 0, axis)
    np.testing.assert_allclose(ddpmpp.halved(jnp.asarray(x), taps), down, atol=1e-6)
    np.testing.assert_allclose(ddpmpp.doubled(jnp.asarray(x), taps), up, atol=1e-6)


def test_the_box_filter_is_the_mean_of_four_pixels_and_the_nearest_neighbour():
    x = image()
    np.testing.assert_allclose(
        ddpmpp.halved(jnp.asarray(x), (1, 1)), x.reshape(1, 3, 2, 4, 2, 2).mean((2, 4)), atol=1e-6
    )
    np.testing.assert_array_equal(ddpmpp.doubled(jnp.asarray(x), (1, 1)), x.repeat(2, axis=1).repeat(2, axis=2))


@pytest.mark.parametrize("taps", FILTERS)
def test_a_constant_image_stays_constant_away_from_its_border(taps):
    ones = jnp.ones((1, 16, 16, 1))
    np.testing.assert_allclose(ddpmpp.halved(ones, taps)[:, 2:-2, 2:-2], 1.0, atol=1e-6)
    np.testing.assert_allclose(ddpmpp.doubled(ones, taps)[:, 4:-4, 4:-4], 1.0, atol=1e-6)


@pytest.mark.parametrize("taps", FILTERS)
def test_the_encoders_convolution_reaches_beyond_the_image(taps):
    """The image lies in endless zeros: convolve all of it, add the bias everywhere, filter, keep every second pixel."""
    x, layer = image(), ddpmpp.HalvingConv(3, taps, jnp.float32)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x)
    params = jax.tree.map(lambda p: np.random.default_rng(1).normal(size=p.shape).astype(np.float32), shapes)
    kernel, bias = params["params"]["conv"]["kernel"], params["params"]["conv"]["bias"]
    wide = np.pad(x[0], ((9, 9), (9, 9), (0, 0)))
    square = np.outer(taps, taps) / sum(taps) ** 2
    for o in range(3):
        convolved = sum(signal.correlate2d(wide[..., c], kernel[..., c, o], mode="same") for c in range(2)) + bias[o]
        filtered = signal.correlate2d(convolved, square, mode="valid")
        first = 9 - (len(taps) // 2 - 1)
        expected = filtered[first : first + 6 : 2, first : first + 8 : 2]
        np.testing.assert_allclose(layer.apply(params, x)[0, ..., o], expected, atol=1e-4)


# ------------------------------------------------------------------------------------------ embeddings


def test_the_positional_embedding_is_the_published_one():
    """Sines, then cosines: NVlabs/edm swaps those of its PositionalEmbedding(endpoint=True)."""
    c_noise = np.array([-1.55, 0.0, 1.1])
    angles = c_noise[:, None] * 1e4 ** -(np.arange(16) / 15.0)
    got = ddpmpp.EMBEDDINGS["positional"](jnp.float32(c_noise), 32)
    np.testing.assert_allclose(got, np.concatenate([np.sin(angles), np.cos(angles)], axis=1), atol=1e-6)


def test_fourier_features_have_normal_frequencies():
    """Sin and cos of 2 pi z t, z ~ N(0, 16^2): z is what the phase gains a unit of t, and the same at all t."""
    times = np.array([1e-3, 2e-3])
    sines, cosines = np.split(np.asarray(ddpmpp.fourier(jnp.float32(times), 256)), 2, axis=1)
    np.testing.assert_allclose(sines**2 + cosines**2, 1.0, atol=1e-6)
    z = np.arctan2(sines, cosines) / (2.0 * np.pi * times[:, None])
    np.testing.assert_allclose(z[0], z[1], atol=1e-2)
    assert stats.kstest(z[0] / 16.0, "norm").pvalue > 0.01


# ------------------------------------------------------------------------------------------ at initialisation


def test_weights_begin_as_published():
    """Xavier's uniform bound sqrt(6 / (in + out)), times 1e-5 in last layers and sqrt(0.2) in queries, keys, values."""
    net = networks.build("family.network", SMALL, SPEC)
    params = jax.jit(net.init)(jax.random.key(0))
    for name, path, bound in [
        ("in", ("kernel",), (6 / (9 * (3 + 32))) ** 0.5),
        ("out", ("kernel",), 1e-5 * (6 / (9 * (32 + 3))) ** 0.5),
        ("down_0_0", ("conv_0", "kernel"), (6 / (9 * 64)) ** 0.5),
        ("down_0_0", ("conv_1", "kernel"), 1e-5 * (6 / (9 * 64)) ** 0.5),
        ("down_0_0", ("condition", "kernel"), (6 / (128 + 32)) ** 0.5),
        ("middle_attention", ("qkv", "kernel"), 0.2**0.5 * (6 / (32 + 96)) ** 0.5),
        ("middle_attention", ("out", "kernel"), 1e-5 * (6 / 64) ** 0.5),
        ("label", ("kernel",), (6 / (5 + 32)) ** 0.5),
    ]:
        leaf = params[name]
        for key in path:
            leaf = leaf[key]
        assert 0.9 * bound < np.abs(leaf).max() <= 1.000001 * bound, (name, path)
        assert np.std(leaf) == pytest.approx(bound / 3**0.5, rel=0.15), (name, path)


def test_blocks_begin_as_the_identity_over_sqrt_2():
    """So that a sum with a branch as large as itself would keep its size."""
    x, condition = jnp.asarray(image(channels=32)), jnp.ones((1, 128))
    block = ddpmpp.ResidualBlock(32, 0.0, 0, jnp.float32, None)
    for layer, given in ((block, (x, condition, None)), (ddpmpp.Attention("auto", jnp.float32), (x,))):
        y = layer.apply(jax.jit(layer.init)(jax.random.key(0), *given), *given)
        np.testing.assert_allclose(y, x / 2**0.5, atol=2e-4)


# ------------------------------------------------------------------------------------------ conditioning


def drawn(net):
    generator = np.random.default_rng(1)
    shapes = jax.eval_shape(net.init, jax.random.key(0))
    scale = lambda p: 0.3 if p.ndim == 1 else np.prod(p.shape[:-1]) ** -0.5
    return jax.tree.map(lambda p: jnp.asarray(scale(p) * generator.normal(size=p.shape), jnp.float32), shapes)


def test_augmentation_conditioning():
    """No label is zeros; a label moves its own example and no other."""
    net = networks.build("family.network", SMALL, SPEC)
    params, apply = drawn(net), jax.jit(net.apply)
    x, t, label = jnp.asarray(image(8, 8, 3)).repeat(3, axis=0), jnp.full((3,), 0.3), jnp.arange(3)
    zeros = jnp.zeros((3, 9))
    plain = apply(params, x, t, label, None, None)
    np.testing.assert_array_equal(apply(params, x, t, label, None, zeros), plain)
    for i in range(9):
        moved = np.abs(apply(params, x, t, label, None, zeros.at[1, i].set(1.0)) - plain).max((1, 2, 3))
        assert moved[1] > 1e-3, i
        np.testing.assert_allclose(moved[[0, 2]], 0.0, atol=1e-5)


def test_labels_are_read_by_one_matrix_times_the_root_of_their_number():
    """Class i moves the embedding by sqrt(5) times row i of the matrix; "none" moves it by nothing."""
    net = networks.build("family.network", SMALL, SPEC)
    params, apply = drawn(net), jax.jit(net.apply)
    x, t = jnp.asarray(image(8, 8, 3)), jnp.full((1,), 0.3)
    row = params["label"]["kernel"][2]
    moved = params | {"label": {"kernel": jnp.zeros((5, 32)), "bias": params["label"]["bias"] + 5**0.5 * row}}
    none = jnp.array([SPEC.num_classes])
    np.testing.assert_allclose(apply(params, x, t, jnp.array([2])), apply(moved, x, t, none), atol=1e-5)
    assert np.abs(apply(params, x, t, jnp.array([2])) - apply(params, x, t, none)).max() > 1e-3


@pytest.mark.parametrize(("name", "width"), [("edm-cifar10", 9), ("edm-ffhq64", 9), ("ddpmpp", 0), ("dit-s/2", 0)])
def test_a_network_says_how_wide_its_augmentation_label_is(name, width):
    assert networks.build("family.network", name, ImageSpec(size=64, channels=3, num_classes=0)).augment == width


def test_time_scale_stretches_the_time():
    """The same network at 1000 t and factor 1, and at t and factor 1000."""
    net = networks.build("family.network", SMALL, SPEC)
    scaled = networks.build("family.network", SMALL[:-1] + ",time_scale=1000.0)", SPEC)
    params, x, label = drawn(net), jnp.asarray(image(8, 8, 3)), jnp.array([1])
    steps = net.apply(params, x, jnp.array([250.0]), label)
    np.testing.assert_allclose(scaled.apply(params, x, jnp.array([0.25]), label), steps, atol=1e-5)
    assert np.abs(net.apply(params, x, jnp.array([0.25]), label) - steps).max() > 1e-3


# ------------------------------------------------------------------------------------------ what does not fit


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("embedding='gauss'", "positional or fourier, not 'gauss'"),
        ("encoder='skip'", "standard or residual, not 'skip'"),
        ("resample=(1,2,1)", "even length"),
        ("resample=(1,3,1,1)", "symmetric"),
        ("resample=()", "even length"),
        ("resample=(-1,-1)", "positive sum"),
        ("augment=-1", "augment"),
        ("noise_multiplier=0", "noise_multiplier"),
        ("time_scale=0.0", "time_scale"),
        ("multipliers=()", "multipliers"),
        ("channels=48", "multiple of 32"),
        ("remat='some'", "remat"),
        ("multipliers=(1,1,1,1,1)", "8 pixels"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(options, says):
    with pytest.raises(UserError, match=r"^family.network.*" + says):
        networks.build("family.network", f"ddpmpp({options})", SPEC)
