"""R3GAN's block against its equation, its beginning as a linear map, and what its two networks promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import signal

from diffusion_jax.errors import UserError
from diffusion_jax.networks import gan
from diffusion_jax.networks.gan import r3gan
from diffusion_jax.types import ImageSpec
from tests.arrays import filled, normals

SPEC = ImageSpec(size=8, channels=3, num_classes=0)
LARGER = ImageSpec(size=16, channels=3, num_classes=0)
LABELLED = ImageSpec(size=8, channels=1, num_classes=5)
SMALL = "channels_base=64,channels_max=8,blocks=1,group=4"
GENERATOR, DISCRIMINATOR = f"r3gan({SMALL},latent=6,embedding=4)", f"r3gan({SMALL})"


pytestmark = pytest.mark.usefixtures("quick_compilation")


def doubled(x):
    """Bilinear: [n,H,W,C] -> [n,2H,2W,C], zeros outside."""
    for axis in (1, 2):
        x = signal.upfirdn(np.array([1.0, 3.0, 3.0, 1.0]) / 4.0, x, up=2, axis=axis)
    return x[:, 1:-1, 1:-1]


def halved(x):
    """Bilinear: [n,H,W,C] -> [n,H/2,W/2,C], zeros outside."""
    for axis in (1, 2):
        x = signal.upfirdn(np.array([1.0, 3.0, 3.0, 1.0]) / 8.0, x, axis=axis)
    return x[:, 2:-1:2, 2:-1:2]


# ------------------------------------------------------------------------------------------ block and beginning


def test_block():
    """x + W3 a(W2 a(W1 x)), W2 acting on each group by itself, in float64."""
    block, x = r3gan.Block(2, 4, 6, jnp.float32), np.asarray(normals(2, 5, 5, 6))
    params = filled(block.init, x)["params"]
    activation = lambda y, bias: np.where(y + bias > 0, y + bias, 0.2 * (y + bias))

    y = activation(x.astype(np.float64) @ params["conv_0"]["kernel"][0, 0], params["bias_0"]["bias"])
    grouped = np.zeros_like(y)
    for j in range(12):
        group = range(4 * (j // 4), 4 * (j // 4) + 4)
        for image in range(2):
            for i, channel in enumerate(group):
                kernel = params["conv_1"]["kernel"][:, :, i, j].astype(np.float64)
                grouped[image, ..., j] += signal.correlate2d(y[image, ..., channel], kernel, "same")
    expected = x + activation(grouped, params["bias_1"]["bias"]) @ params["conv_2"]["kernel"][0, 0]
    np.testing.assert_allclose(block.apply({"params": params}, x), expected, rtol=1e-4, atol=1e-5)


def test_both_grouped_convolutions_are_one():
    """By products, as on CPUs, and by XLA's convolution: values and gradients."""
    x, kernel, direction = normals(2, 5, 4, 12), normals(3, 3, 4, 6, seed=2), normals(2, 5, 4, 6, seed=3)
    of = lambda convolve: lambda x, kernel: jnp.sum(direction * jnp.tanh(convolve(x, kernel, 3)))
    both = [jax.value_and_grad(of(f), (0, 1))(x, kernel) for f in (r3gan.grouped_products, r3gan.grouped_convolution)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), *both)


def test_generator_begins_as_a_linear_map():
    """Every block is the identity: the basis, weighted by a matrix of z, is doubled twice and seen through a matrix."""
    generator = gan.build_generator("generator", GENERATOR, LARGER)
    params, z = jax.jit(generator.init)(jax.random.key(0)), normals(3, 6)
    x = params["basis"][None] * (z @ params["in"]["kernel"])[:, None, None]
    x = doubled(doubled(x) @ params["widen_16"]["kernel"][0, 0])  # 8, 8 and 4 channels at 4, 8 and 16 pixels
    expected = x @ params["out"]["kernel"][0, 0]
    np.testing.assert_allclose(jax.jit(generator.apply)(params, z, None, None), expected, rtol=1e-4, atol=1e-5)


def test_discriminator_begins_as_a_linear_map():
    discriminator = gan.build_discriminator("discriminator", DISCRIMINATOR, LARGER)
    params, x = jax.jit(discriminator.init)(jax.random.key(0)), normals(3, *LARGER.shape)
    y = halved(x @ params["in"]["kernel"][0, 0]) @ params["widen_8"]["kernel"][0, 0]
    y = np.sum(params["basis"][None] * halved(y), axis=(1, 2)) @ params["logit"]["kernel"][:, 0]
    np.testing.assert_allclose(jax.jit(discriminator.apply)(params, x, None), y, rtol=1e-4, atol=1e-5)


def test_size_of_the_weights_at_the_beginning():
    """He et al. 2015, eq. 15, for slope 0.2, times L^(-1/4) for L blocks in all; W3 = 0 (Zhang et al. 2019)."""
    generator = gan.build_generator("generator", "r3gan(channels_base=512,channels_max=64,blocks=3)", LABELLED)
    params = jax.jit(generator.init)(jax.random.key(0))["block_8_2"]
    he = np.sqrt(2.0 / 1.04) * 6**-0.25
    assert np.std(params["conv_0"]["kernel"]) == pytest.approx(he / np.sqrt(64), rel=0.05)
    assert np.std(params["conv_1"]["kernel"]) == pytest.approx(he / np.sqrt(9 * 16), rel=0.05)
    np.testing.assert_array_equal(params["conv_2"]["kernel"], 0.0)


# ------------------------------------------------------------------------------------------ both networks


def test_images_do_not_know_their_batch():
    generator = gan.build_generator("generator", GENERATOR, LABELLED)
    discriminator = gan.build_discriminator("discriminator", DISCRIMINATOR, LABELLED)
    z, label = normals(3, 6), np.int32([4, 0, 2])
    params = filled(generator.init)
    image = np.asarray(jax.jit(generator.apply)(params, z, label, None))
    alone = jax.jit(generator.apply)(params, z[1:2], label[1:2], None)
    np.testing.assert_allclose(alone[0], image[1], rtol=1e-4, atol=1e-5)
    params = filled(discriminator.init)
    logit = jax.jit(discriminator.apply)(params, image, label)
    np.testing.assert_allclose(
        jax.jit(discriminator.apply)(params, image[1:2], label[1:2])[0], logit[1], rtol=1e-4, atol=1e-5
    )


def test_labels_count():
    generator = gan.build_generator("generator", GENERATOR, LABELLED)
    params, z = filled(generator.init), np.repeat(normals(1, 6), 5, axis=0)
    images = jax.jit(generator.apply)(params, z, np.arange(5, dtype=np.int32), None)
    assert min(np.abs(images[i] - images[j]).max() for i in range(5) for j in range(i)) > 1e-3


def test_a_label_s_logit_is_a_projection():
    """Logits of all labels y are v_y h for one h, of 2 numbers here: of five rows no more than 2 are independent."""
    discriminator = gan.build_discriminator(
        "discriminator", "r3gan(channels_base=8,channels_max=2,blocks=1,group=2)", LABELLED
    )
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


def test_gradients_in_bfloat16():
    """Biases are sums over 4,096 pixels; summed in bfloat16 they would be off by 1 %."""
    x, direction = normals(4, 32, 32, 8), 1.0 + normals(4, 32, 32, 8, seed=3)

    params = filled(r3gan.Block(2, 4, 6, jnp.float32).init, x)

    def gradient(dtype):
        block = r3gan.Block(2, 4, 6, dtype)
        loss = lambda params: jnp.mean(direction * block.apply(params, x.astype(dtype)).astype(jnp.float32))
        return jax.jit(jax.grad(loss))(params)

    relative = lambda a, b: np.linalg.norm(a - b) / np.linalg.norm(b)
    errors = jax.tree.map(relative, gradient(jnp.bfloat16), gradient(jnp.float32))
    assert max(jax.tree.leaves(errors)) < 0.05, errors
    assert max(errors["params"][name]["bias"] for name in ("bias_0", "bias_1")) < 0.007, errors


@pytest.mark.parametrize(
    ("text", "size", "says"),
    [
        ("r3gan", 12, "power of two"),
        ("r3gan", 4, "power of two"),
        ("r3gan(channels_base=8)", 16, "channels_base must be at least 16"),
        ("r3gan(group=5)", 16, "group must divide the 1536 channels inside the blocks at 4x4"),
        ("r3gan(blocks=0)", 16, "blocks must be at least 1"),
        ("r3gan(width=8)", 16, "no option 'width'"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(text, size, says):
    for build in (gan.build_generator, gan.build_discriminator):
        with pytest.raises(UserError, match=r"^family.network.*" + says):
            build("family.network", text, ImageSpec(size=size, channels=3, num_classes=0))
