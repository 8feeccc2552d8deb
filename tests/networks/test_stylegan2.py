"""StyleGAN2's parts against NumPy's and SciPy's statement of their equations, and what its two networks promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import signal

from diffusion_jax.errors import UserError
from diffusion_jax.networks import flops, gan
from diffusion_jax.networks.gan import stylegan2
from diffusion_jax.types import ImageSpec

SPEC = ImageSpec(size=8, channels=3, num_classes=0)
LARGER = ImageSpec(size=16, channels=3, num_classes=0)
LABELLED = ImageSpec(size=8, channels=3, num_classes=5)
SMALL = "channels_base=64,channels_max=8,mapping_layers=2"
GENERATOR, DISCRIMINATOR = f"stylegan2({SMALL},latent=6,style=10)", f"stylegan2({SMALL},group=2)"


pytestmark = pytest.mark.usefixtures("quick_compilation")


def normals(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def filled(init, *arguments, seed=1):
    """Standard normals in place of all parameters that `init` makes."""
    generator = np.random.default_rng(seed)
    shapes = jax.eval_shape(init, jax.random.key(0), *arguments)
    return jax.tree.map(lambda leaf: np.asarray(generator.normal(size=leaf.shape), np.float32), shapes)


def keys(n, seed=0):
    return jax.random.split(jax.random.key(seed), n)


def lrelu(x):
    return np.sqrt(2.0) * np.where(x > 0, x, 0.2 * x)


def correlated(x, kernel):
    """Cross-correlation [H,W,C] with [k,k,C,D], inside alone, in float64."""
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    pairs = [
        sum(signal.correlate2d(x[..., i], kernel[..., i, j], "valid") for i in range(x.shape[-1]))
        for j in range(kernel.shape[-1])
    ]
    return np.stack(pairs, axis=-1)


def padded(x, p):
    return np.pad(x, ((p, p), (p, p), (0, 0)))


def doubled_beyond(x):
    """x doubled by (1, 3, 3, 1), as far as the filter reaches: [H,W,C] -> [2H+2,2W+2,C]."""
    taps = np.array([1.0, 3.0, 3.0, 1.0]) / 4.0
    for axis in (0, 1):
        x = signal.upfirdn(taps, x, up=2, axis=axis)
    return x


def blurred_beyond(x):
    """x filtered by (1, 3, 3, 1), as far as the filter reaches: [H,W,C] -> [H+3,W+3,C]."""
    for axis in (0, 1):
        x = signal.upfirdn(np.array([1.0, 3.0, 3.0, 1.0]) / 8.0, x, axis=axis)
    return x


# ------------------------------------------------------------------------------------------ modulation and filters


@pytest.mark.parametrize(
    ("size", "double", "demodulate"), [(3, False, True), (3, True, True), (1, False, False)], ids=str
)
def test_modulated_convolution_is_the_naive_one(size, double, demodulate):
    """Karras et al. 2020, eq. 1 and 3: a kernel of its own for each example, in float64."""
    layer = stylegan2.ModulatedConv(5, size=size, double=double, demodulate=demodulate)
    x, w = normals(3, 6, 4, 7), normals(3, 9, seed=2)
    params = filled(layer.init, x, w)
    got = jax.jit(layer.apply)(params, x, w)

    kernel = params["params"]["kernel"].astype(np.float64) / np.sqrt(size * size * 7)
    affine = params["params"]["style"]
    styles = w @ affine["kernel"].astype(np.float64) / 3.0 + affine["bias"]
    for image, style, y in zip(x, styles, got, strict=True):
        modulated = style[:, None] * kernel
        if demodulate:
            modulated = modulated / np.sqrt(np.sum(modulated**2, axis=(0, 1, 2)) + 1e-8)
        inputs = doubled_beyond(image) if double else padded(image, size // 2)
        np.testing.assert_allclose(y, correlated(inputs, modulated), rtol=1e-4, atol=1e-4)


def test_demodulated_outputs_do_not_know_the_styles_length():
    layer = stylegan2.ModulatedConv(5)
    x, w = normals(2, 4, 4, 7), normals(2, 9, seed=2)
    params = filled(layer.init, x, w)
    longer = jax.tree.map(np.copy, params)
    longer["params"]["style"] = {name: 20.0 * leaf for name, leaf in params["params"]["style"].items()}
    np.testing.assert_allclose(layer.apply(params, x, w), layer.apply(longer, x, w), rtol=1e-4, atol=1e-4)


def test_halving_layer():
    """Filter, then every second pixel of the convolution, bias, leaky ReLU times sqrt(2)."""
    layer, x = stylegan2.Layer(5, halve=True), normals(2, 8, 6, 4)
    params = filled(layer.init, x)["params"]
    expected = [
        correlated(blurred_beyond(image)[1:-1, 1:-1], params["kernel"] / 6.0)[::2, ::2] + params["bias"] for image in x
    ]
    np.testing.assert_allclose(layer.apply({"params": params}, x), lrelu(np.stack(expected)), rtol=1e-4, atol=1e-4)


def test_image_of_each_resolution_is_doubled_and_added():
    """Without weights towards RGB, the biases are all there is: at 4x4 one, at 8x8 another, at 16x16 a third."""
    generator = gan.build_generator("generator", GENERATOR, LARGER)
    params = filled(generator.init)
    synthesis = params["synthesis_network"]
    for side in (4, 8, 16):
        synthesis[f"image_{side}"]["conv"]["kernel"][:] = 0.0
    colours = [synthesis[f"image_{side}"]["bias"] * np.ones((side, side, 3)) for side in (4, 8, 16)]
    once = doubled_beyond(colours[0])[1:-1, 1:-1] + colours[1]
    expected = doubled_beyond(once)[1:-1, 1:-1] + colours[2]
    got = jax.jit(generator.apply)(params, normals(2, 6), None, keys(2))
    np.testing.assert_allclose(got, np.stack([expected] * 2), rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------ mapping


def test_mapping():
    """z / rms(z), beside it the label's row / rms, then layers whose weights count a hundredth."""
    generator = gan.build_generator("generator", GENERATOR, LABELLED)
    params, z, label = filled(generator.init), normals(4, 6), np.int32([3, 0, 3, 1])
    got = jax.jit(generator.style.mapping)(params, z, label)

    mapping = params["mapping_network"]
    embedded = mapping["label"]["kernel"][label] / np.sqrt(5.0) + mapping["label"]["bias"]
    unit = lambda x: x / np.sqrt(np.mean(np.square(x), axis=1, keepdims=True))
    x = np.concatenate([unit(z), unit(embedded)], axis=1)
    for i, inputs in enumerate((16, 10)):
        layer = mapping[f"dense_{i}"]
        x = lrelu(0.01 * (x @ layer["kernel"] / np.sqrt(inputs) + layer["bias"]))
    np.testing.assert_allclose(got, x, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(jax.jit(generator.style.mapping)(params, 7.0 * z, label), got, rtol=1e-4, atol=1e-7)


def test_weights_begin_as_normals_of_the_rate_s_size():
    """Equalised learning rate: Adam's steps are of one size, so that weights 100 times as large move 100 times less."""
    generator = gan.build_generator("generator", "stylegan2(channels_base=512,channels_max=64)", LABELLED)
    params = jax.jit(generator.init)(jax.random.key(0))
    assert np.std(params["mapping_network"]["dense_3"]["kernel"]) == pytest.approx(100.0, rel=0.02)
    conv = params["synthesis_network"]["conv_8"]
    assert np.std(conv["conv"]["kernel"]) == pytest.approx(1.0, rel=0.02)
    np.testing.assert_array_equal(conv["conv"]["style"]["bias"], 1.0)  # the styles' mean
    assert conv["strength"] == 0.0  # no noise at the beginning


# ------------------------------------------------------------------------------------------ generator


def test_style_is_the_generator_in_two_parts():
    generator = gan.build_generator("generator", GENERATOR, LABELLED)
    params, z, label = filled(generator.init), normals(2, 6), np.int32([3, 0])

    @jax.jit
    def both(params):
        w = generator.style.mapping(params, z, label)
        return generator.apply(params, z, label, keys(2)), generator.style.synthesis(params, w, keys(2))

    np.testing.assert_allclose(*both(params), rtol=1e-5, atol=1e-5)


def test_noise_belongs_to_the_image_s_key():
    generator = gan.build_generator("generator", GENERATOR, SPEC)
    params, z, apply = filled(generator.init), normals(3, 6), jax.jit(generator.apply)
    image = np.asarray(apply(params, z, None, keys(3)))
    order = np.array([2, 0, 1])
    np.testing.assert_allclose(apply(params, z[order], None, keys(3)[order]), image[order], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(apply(params, z[1:2], None, keys(3)[1:2])[0], image[1], rtol=1e-4, atol=1e-4)
    assert np.abs(apply(params, z, None, keys(3, seed=1)) - image).mean() > 0.01
    assert np.abs(apply(params, z, None, None) - image).mean() > 0.01


def test_noise_is_standard_and_the_same_for_all_channels():
    """sqrt(2) lrelu(w'' * x + strength n + b) with w'' * x = 0 and b large is linear in n."""
    layer = stylegan2.StyledConv(4, False, 0, jnp.float32)
    x, w, own = np.zeros((64, 8, 8, 3), np.float32), normals(64, 5), keys(64)
    params = filled(layer.init, x, w, own)
    params["params"]["bias"], params["params"]["strength"] = np.full(4, 100.0, np.float32), np.float32(3.0)
    noise = (np.asarray(layer.apply(params, x, w, own)) / np.sqrt(2.0) - 100.0) / 3.0
    np.testing.assert_allclose(noise, np.repeat(noise[..., :1], 4, axis=-1), atol=1e-5)
    assert abs(noise[..., 0].mean()) < 0.06  # four standard errors of 4096 numbers
    assert noise[..., 0].std() == pytest.approx(1.0, abs=0.05)


# ------------------------------------------------------------------------------------------ discriminator


def deviation(x, groups):
    """For each group the mean over features of the standard deviation over its examples, in float64."""
    return [np.mean(np.sqrt(np.var(x[group].astype(np.float64), axis=0) + 1e-8)) for group in groups]


@pytest.mark.parametrize(
    ("n", "group", "groups"),
    [
        (8, 4, [[0, 2, 4, 6], [1, 3, 5, 7]]),
        (6, 4, [[0, 2, 4], [1, 3, 5]]),  # 4 does not divide 6
        (2, 4, [[0, 1]]),
        (3, 1, [[0], [1], [2]]),
    ],
    ids=str,
)
def test_minibatch_standard_deviation(n, group, groups):
    x = normals(n, 4, 4, 5)
    y = np.asarray(stylegan2.with_deviation(jnp.asarray(x), group))
    np.testing.assert_array_equal(y[..., :5], x)
    for members, expected in zip(groups, deviation(x, groups), strict=True):
        np.testing.assert_allclose(y[members][..., 5], np.full((len(members), 4, 4), expected), rtol=1e-5)


def test_microbatches_see_the_groups_of_the_whole_batch():
    """A microbatch is every m-th example (`Trainer.split`), and so is a group."""
    discriminator = gan.build_discriminator("discriminator", DISCRIMINATOR, SPEC)
    params, x = filled(discriminator.init), normals(8, *SPEC.shape)
    params["conv_4"]["kernel"][:, :, -1] *= 100.0  # the standard deviation's, so that it counts
    apply = jax.jit(discriminator.apply)
    whole = np.asarray(apply(params, x, None))
    for start in range(4):
        np.testing.assert_allclose(apply(params, x[start::4], None), whole[start::4], rtol=1e-4, atol=1e-4)
    assert np.abs(apply(params, x[:2], None) / whole[:2] - 1.0).max() > 0.01  # neighbours are no group


def test_devices_do_not_change_the_groups():
    """One example a device: each group is spread over two."""
    discriminator = gan.build_discriminator("discriminator", DISCRIMINATOR, SPEC)
    params, x = filled(discriminator.init), normals(8, *SPEC.shape)
    params["conv_4"]["kernel"][:, :, -1] *= 100.0
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.device_put(x, jax.NamedSharding(mesh, jax.P("data")))
    apply = jax.jit(discriminator.apply)
    np.testing.assert_allclose(apply(params, spread, None), apply(params, x, None), rtol=1e-4)


def test_residual_block():
    """(1x1 convolution of the halved x + the two convolutions) / sqrt(2), in float64."""
    block, x = stylegan2.ResidualBlock(5, jnp.float32), normals(1, 8, 8, 3)
    params = filled(block.init, x)["params"]
    skip = correlated(blurred_beyond(x[0])[2:-1:2, 2:-1:2], params["kernel"] / np.sqrt(3.0))
    y = correlated(padded(x[0], 1), params["conv"]["kernel"] / np.sqrt(27.0)) + params["conv"]["bias"]
    y = correlated(blurred_beyond(lrelu(y))[1:-1, 1:-1], params["halve"]["kernel"] / np.sqrt(27.0))[::2, ::2]
    expected = (skip + lrelu(y + params["halve"]["bias"])) / np.sqrt(2.0)
    np.testing.assert_allclose(block.apply({"params": params}, x)[0], expected, rtol=1e-4, atol=1e-4)


def test_a_label_s_logit_is_a_projection():
    """Logits of all labels y are v_y h for one h: of four labels' logits at many images no more than C are independent.

    Here C = 2 channels at 4x4 and five labels: rank 2. A label that h knew of would make it 5.
    """
    text = "stylegan2(channels_base=8,channels_max=2,mapping_layers=2,group=1)"
    discriminator = gan.build_discriminator("discriminator", text, LABELLED)
    params, x = filled(discriminator.init), normals(12, *LABELLED.shape)
    apply = jax.jit(discriminator.apply)
    logits = np.stack([apply(params, x, np.full(12, label, np.int32)) for label in range(5)])
    singular = np.linalg.svd(logits, compute_uv=False)
    assert singular[1] > 1e-3 * singular[0]
    assert singular[2] < 1e-5 * singular[0]


@pytest.mark.parametrize("spec", [SPEC, LABELLED], ids=["plain", "labelled"])
def test_r1_has_gradients(spec):
    """The mean square of the image's gradient reaches every kernel, by finite numbers."""
    discriminator = gan.build_discriminator("discriminator", DISCRIMINATOR, spec)
    params, x = filled(discriminator.init), normals(4, *spec.shape)
    label = np.int32([0, 1, 2, 3]) if spec.num_classes else None

    def r1(params):
        gradient = jax.grad(lambda x: jnp.sum(discriminator.apply(params, x, label)))(x)
        return jnp.mean(jnp.sum(jnp.square(gradient), (1, 2, 3)))

    gradient = jax.jit(jax.grad(r1))(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.isfinite(leaf).all(), path
        assert leaf.ndim == 1 or np.abs(leaf).max() > 0.0, path


# ------------------------------------------------------------------------------------------ both


LAYERS = {
    "styled": (lambda dtype: stylegan2.StyledConv(4, False, 0, dtype), True, 0.05),
    "doubling": (lambda dtype: stylegan2.StyledConv(4, True, 0, dtype), True, 0.015),
    "plain": (lambda dtype: stylegan2.Layer(4, dtype=dtype), False, 0.004),
    "residual": (lambda dtype: stylegan2.ResidualBlock(4, dtype), False, 0.005),
}
"""name -> (layer, whether it takes a style and keys, how far biases' gradients may be off)."""


@pytest.mark.parametrize(("layer", "styled", "bound"), LAYERS.values(), ids=LAYERS)
def test_gradients_in_bfloat16(layer, styled, bound):
    """Biases are sums over 4,096 pixels; summed in bfloat16 they would be off by twice the bounds."""
    x, given = normals(4, 32, 32, 6), (normals(4, 9, seed=2), keys(4)) if styled else ()
    params = filled(layer(jnp.float32).init, x, *given)

    def gradient(dtype):
        def loss(params):
            y = layer(dtype).apply(params, x.astype(dtype), *given).astype(jnp.float32)
            return jnp.mean((1.0 + normals(*y.shape, seed=3)) * y)

        return jax.jit(jax.grad(loss))(params)

    relative = lambda a, b: (np.linalg.norm(a - b) / np.linalg.norm(b), bound if a.ndim == 1 else 0.1)
    errors = jax.tree.map(relative, gradient(jnp.bfloat16), gradient(jnp.float32))
    assert all(error < most for error, most in jax.tree.leaves(errors, is_leaf=lambda e: isinstance(e, tuple))), errors


def test_multiply_adds():
    """Of the convolutions and dense layers, from their sizes; a doubling one works at its input's resolution.

    Filters, modulations and demodulations come on top: less than 2 %.
    """
    spec = ImageSpec(size=256, channels=3, num_classes=0)
    generator = gan.build_generator("generator", "stylegan2-256", spec)
    channels = lambda side: min(16384 // side, 512)
    total = 8 * 512**2
    for side in (4, 8, 16, 32, 64, 128, 256):
        pixels, outer, inner = side**2, channels(side // 2), channels(side)
        if side > 4:
            total += pixels // 4 * 9 * outer * inner + 512 * outer + outer * inner
        total += pixels * 9 * inner**2 + 512 * inner + inner**2
        total += pixels * 3 * inner + 512 * inner
    params = jax.eval_shape(generator.init, jax.random.key(0))
    counted = flops.multiply_adds_of(generator.apply, params, jnp.zeros((1, 512)), None, None)
    assert total < counted < 1.02 * total


@pytest.mark.parametrize(
    ("text", "size", "says"),
    [
        ("stylegan2", 12, "power of two"),
        ("stylegan2", 4, "power of two"),
        ("stylegan2(channels_base=8)", 16, "channels_base must be at least 16"),
        ("stylegan2(channels_max=0)", 16, "channels_max must be at least 1"),
        ("stylegan2(mapping_layers=0)", 16, "mapping_layers must be at least 1"),
        ("stylegan2-255", 16, "did you mean 'stylegan2-256'"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(text, size, says):
    for build in (gan.build_generator, gan.build_discriminator):
        with pytest.raises(UserError, match=r"^family.network.*" + says):
            build("family.network", text, ImageSpec(size=size, channels=3, num_classes=0))
