"""Networks of GANs, DCGAN's and the residual ones: published counts, parts against equations, promises as wholes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import tree
from diffusion_jax.errors import UserError
from diffusion_jax.networks import gan
from diffusion_jax.networks.gan import dcgan, resnet
from diffusion_jax.types import ImageSpec
from tests.arrays import filled, normals

SPEC = ImageSpec(size=8, channels=3, num_classes=5)
PLAIN = ImageSpec(size=8, channels=3, num_classes=0)
GENERATORS = {
    "dcgan": "dcgan(width=8,latent=6)",
    "resnet": "resnet(width=8,multipliers=(2,),latent=6,embedding=4,attention=8)",
}
DISCRIMINATORS = {"dcgan": "dcgan(width=8)", "resnet": "resnet(width=8,multipliers=(2,),blocks=1,attention=4)"}


pytestmark = pytest.mark.usefixtures("quick_compilation")


@functools.cache
def generator(name, spec=SPEC, precision="float32"):
    """(parameters at random; the compiled (params, z, label))."""
    network = gan.build_generator("family.generator", GENERATORS[name], spec, precision)
    return filled(network.init), jax.jit(network.apply)


@functools.cache
def discriminator(name, spec=SPEC, precision="float32"):
    network = gan.build_discriminator("family.discriminator", DISCRIMINATORS[name], spec, precision)
    return filled(network.init), jax.jit(network.apply)


# ------------------------------------------------------------------------------------------ counts


def sizes(init):
    """Number of parameters by path."""
    leaves = jax.tree_util.tree_leaves_with_path(jax.eval_shape(init, jax.random.key(0)))
    return {tree.path_name(path): leaf.size for path, leaf in leaves}


def test_dcgan_counts():
    """3,576,704 and 2,765,568 of pytorch/examples, which has no bias beside its batch norms."""
    spec = ImageSpec(size=64, channels=3, num_classes=0)
    made = sizes(gan.build_generator("g", "dcgan(width=64)", spec).init)
    biases = sum(size for name, size in made.items() if name.endswith("bias") and "norm" not in name)
    assert biases == 16 * 512 + 256 + 128 + 64 + 3
    assert sum(made.values()) - biases == 3_576_704
    made = sizes(gan.build_discriminator("d", "dcgan(width=64)", spec).init)
    biases = sum(size for name, size in made.items() if name.endswith("bias") and "norm" not in name)
    assert biases == 64 + 128 + 256 + 512 + 1
    assert sum(made.values()) - biases == 2_765_568


def test_sngan_counts():
    """CIFAR-10: 4,276,739 of kwotsin/mimicry, and the z of the norms; the discriminator layer by layer of Table 4."""
    spec = ImageSpec(size=32, channels=3, num_classes=0)
    made = sizes(gan.build_generator("g", "resnet", spec).init)
    of_z = sum(size for name, size in made.items() if "condition" in name)
    assert of_z == 7 * 128 * 2 * 256
    assert sum(made.values()) - of_z == 4_276_739
    conv = lambda size, inputs, outputs: size**2 * inputs * outputs + outputs
    first = conv(3, 3, 128) + conv(3, 128, 128) + conv(1, 3, 128)
    halving = 2 * conv(3, 128, 128) + conv(1, 128, 128)
    rest = 2 * 2 * conv(3, 128, 128) + 128 + 1
    assert sum(sizes(gan.build_discriminator("d", "resnet", spec).init).values()) == first + halving + rest


def test_classes_add_their_embeddings():
    """A vector a class in the projection; in the generator one that is concatenated to z."""
    for name in DISCRIMINATORS:
        made, plain = (sizes(gan.build_discriminator("d", DISCRIMINATORS[name], s).init) for s in (SPEC, PLAIN))
        features = {"dcgan": 4 * 4 * 8, "resnet": 16}[name]
        assert sum(made.values()) - sum(plain.values()) == 5 * features
    made, plain = (sizes(gan.build_generator("g", GENERATORS["dcgan"], s).init) for s in (SPEC, PLAIN))
    assert sum(made.values()) - sum(plain.values()) == 5 * 6 + 6 * 16 * 8


# ------------------------------------------------------------------------------------------ the parts


def test_the_transposed_convolution_is_the_transpose_of_a_strided_one():
    """<T x, y> = <x, C y>, for the convolution C with stride 2 and the kernel turned over."""
    module = dcgan.TransposedConv(5, jnp.float32)
    x, y = normals(2, 3, 3, 4, seed=1), normals(2, 6, 6, 5, seed=2)
    params = {"kernel": normals(4, 4, 4, 5, seed=3), "bias": jnp.zeros(5)}
    made = module.apply({"params": params}, x)
    assert made.shape == y.shape
    turned = jnp.swapaxes(params["kernel"][::-1, ::-1], 2, 3)
    back = jax.lax.conv_general_dilated(
        y, turned, (2, 2), [(1, 1), (1, 1)], dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest"
    )
    np.testing.assert_allclose(jnp.sum(made * y), jnp.sum(x * back), rtol=1e-5)


def test_projection():
    """w h + b + v_y h (Miyato & Koyama 2018, eq. 8)."""
    h, label = normals(4, 6), jnp.int32([0, 2, 1, 2])
    params = {
        "logit": {"kernel": normals(6, 1, seed=1), "bias": normals(1, seed=2)},
        "label": {"kernel": normals(3, 6)},
    }
    logits = dcgan.Projection(3, jnp.float32).apply({"params": params}, h, label)
    w, b, v = params["logit"]["kernel"][:, 0], params["logit"]["bias"], params["label"]["kernel"]
    expected = [np.dot(w, h[i]) + b[0] + np.dot(v[label[i]], h[i]) for i in range(4)]
    np.testing.assert_allclose(logits, expected, rtol=1e-5)


def test_the_conditional_norm():
    """(1 + scale) (x - mean) / std + shift over groups of 4 channels, each image on its own, in NumPy."""
    x, c = 3.0 + 2.0 * normals(2, 3, 3, 8, seed=1), normals(2, 5, seed=2)
    kernel = normals(5, 16, seed=3)
    params = {"condition": {"kernel": kernel}, "norm": {"scale": jnp.ones(8), "bias": jnp.zeros(8)}}
    groups = np.asarray(x, np.float64).reshape(2, 3, 3, 2, 4)
    normal = (groups - groups.mean((1, 2, 4), keepdims=True)) / groups.std((1, 2, 4), keepdims=True)
    vectors = np.asarray(c @ kernel)[:, None, None]
    expected = (1.0 + vectors[..., :8]) * normal.reshape(x.shape) + vectors[..., 8:]
    made = resnet.ConditionalNorm(jnp.float32).apply({"params": params}, x, c)
    np.testing.assert_allclose(made, expected, atol=1e-4)


def test_self_attention():
    """x + gain * softmax(q k^T / sqrt(d)) v W over all pixels; nothing but x at the start."""
    x, module = normals(2, 2, 3, 16), resnet.SelfAttention(jnp.float32)
    begun = module.init(jax.random.key(0), x)
    np.testing.assert_array_equal(module.apply(begun, x), x)
    params = filled(lambda key: module.init(key, x)["params"])
    flat = np.asarray(x, np.float64).reshape(2, 6, 16)
    q, k, v = (flat @ np.asarray(params[name]["kernel"]) for name in "qkv")
    w = np.exp(q @ k.swapaxes(1, 2) / np.sqrt(2))
    y = w / w.sum(-1, keepdims=True) @ v @ np.asarray(params["out"]["kernel"])
    expected = flat + float(params["gain"]) * y
    np.testing.assert_allclose(module.apply({"params": params}, x).reshape(2, 6, 16), expected, atol=1e-5)


# ------------------------------------------------------------------------------------------ as wholes


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("spec", [SPEC, PLAIN], ids=["classes", "plain"])
def test_images_depend_on_their_own_row_alone(name, spec):
    """f32[n,H,W,C] in [-1, 1]; of z and, where there are classes, of the label."""
    params, apply = generator(name, spec)
    z, label = normals(4, 6), jnp.int32([0, 1, 0, 1]) if spec.num_classes else None
    images = apply(params, z, label)
    assert (images.shape, images.dtype) == ((4, *spec.shape), jnp.float32)
    assert np.abs(images).max() <= 1.0
    for i in range(4):
        alone = apply(params, z[i : i + 1], None if label is None else label[i : i + 1])
        np.testing.assert_allclose(alone[0], images[i], atol=1e-5)
    assert not np.allclose(images[0], images[1], atol=1e-3)
    if label is not None:
        other = apply(params, z, label + 1)
        assert np.all(np.abs(other - images).max((1, 2, 3)) > 1e-3)


@pytest.mark.parametrize("name", DISCRIMINATORS)
@pytest.mark.parametrize("spec", [SPEC, PLAIN], ids=["classes", "plain"])
def test_logits_depend_on_their_own_row_alone(name, spec):
    params, apply = discriminator(name, spec)
    x, label = normals(4, *spec.shape), jnp.int32([0, 1, 0, 1]) if spec.num_classes else None
    logits = apply(params, x, label)
    assert (logits.shape, logits.dtype) == ((4,), jnp.float32)
    for i in range(4):
        alone = apply(params, x[i : i + 1], None if label is None else label[i : i + 1])
        np.testing.assert_allclose(alone[0], logits[i], atol=1e-5)
    if label is not None:
        assert np.all(np.abs(apply(params, x, label + 1) - logits) > 1e-4)


@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_a_penalty_on_the_slope_has_a_derivative(name):
    """d/ds of |grad D|^2 along a direction of the parameters, by finite differences."""
    params, apply = discriminator(name)
    x, label = normals(2, *SPEC.shape), jnp.int32([0, 1])

    @jax.jit
    def penalty(params):
        slope = jax.grad(lambda x: jnp.sum(apply(params, x, label)))(x)
        return jnp.sum(jnp.square(slope))

    gradient = jax.jit(jax.grad(penalty))(params)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))
    squared = sum(float(jnp.sum(jnp.square(leaf))) for leaf in jax.tree.leaves(gradient))
    moved = lambda s: jax.tree.map(lambda leaf, slope: leaf + s * slope, params, gradient)
    s = 1e-3 * float(penalty(params)) / squared
    np.testing.assert_allclose(penalty(moved(s)) - penalty(moved(-s)), 2.0 * s * squared, rtol=0.05)


@pytest.mark.parametrize("name", GENERATORS)
def test_bfloat16_gradients_are_those_of_float32(name):
    """Of a weighted sum of pixels; those of biases, which are sums over pixels, too."""
    z, label, weight = normals(8, 6), jnp.arange(8) % 5, 1.0 + normals(8, *SPEC.shape, seed=1)
    gradients = []
    for precision in ("float32", "bfloat16"):
        params, apply = generator(name, SPEC, precision)
        loss = lambda params, apply=apply: jnp.sum(weight * apply(params, z, label))
        gradients.append(jax.jit(jax.grad(loss))(params))
    for (path, exact), rough in zip(
        jax.tree_util.tree_leaves_with_path(gradients[0]), jax.tree.leaves(gradients[1]), strict=True
    ):
        off = np.linalg.norm(np.asarray(exact) - np.asarray(rough)) / np.linalg.norm(exact)
        assert off < 0.1, (tree.path_name(path), off)


@pytest.mark.parametrize(
    ("text", "size", "says"),
    [
        ("dcgan", 12, "power of two from 8 on"),
        ("dcgan(width=12)", 8, "width must be 4, 8, 16 or a multiple of 32"),
        ("dcgan(latent=0)", 8, "latent must be at least 1"),
        ("dcgan(depth=3)", 8, "no option 'depth'"),
        ("resnet", 8, r"3 multipliers double a side of 4 to 32 pixels, not to 8"),
        ("resnet(multipliers=())", 8, "multipliers must be whole numbers"),
        ("resnet(multipliers=(1,),attention=4)", 8, "attention = 4 is none of the sides 8"),
        ("resnet(width=16,multipliers=(9,))", 8, "multiple of 32, and 144 are not"),
        ("dgcan", 8, "did you mean 'dcgan'"),
    ],
)
def test_impossible_generators_are_refused(text, size, says):
    with pytest.raises(UserError, match=says):
        gan.build_generator("family.generator", text, ImageSpec(size=size, channels=1, num_classes=0))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("resnet(multipliers=(1,1,1,1))", "halve the image 4 times"),
        ("resnet(multipliers=(1,),attention=8)", "attention = 8 is none of the sides 4"),
        ("resnet(blocks=-1)", "blocks must not be negative"),
        ("dcgan(width=20)", "width must be 4"),
        ("dcgan(latent=3)", "no option 'latent'"),
    ],
)
def test_impossible_discriminators_are_refused(text, says):
    with pytest.raises(UserError, match=says):
        gan.build_discriminator("family.discriminator", text, PLAIN)
