"""The parts of DDPM's and OpenAI's U-Nets against their equations, and what both promise as wholes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import networks
from diffusion_jax.errors import UserError
from diffusion_jax.networks import adm, layers, unet
from diffusion_jax.types import ImageSpec
from tests.arrays import filled, normals

SPEC = ImageSpec(size=8, channels=3, num_classes=5)
UNLABELLED = ImageSpec(size=8, channels=3, num_classes=0)
SMALL = {
    "unet": "unet(channels=32,multipliers=(1,),blocks=1,attention=(8,)",
    "adm": "adm(channels=32,multipliers=(1,),blocks=1,attention=(8,),head_channels=16",
}


pytestmark = pytest.mark.usefixtures("quick_compilation")


def silu(x):
    return x / (1.0 + np.exp(-x))


def group_norm(x, layer, epsilon):
    """32 channels in groups of 4 (Wu & He 2018, eq. 1 to 3), in float64."""
    groups = np.asarray(x, np.float64).reshape(*x.shape[:-1], -1, 4)
    mean, variance = groups.mean((1, 2, 4), keepdims=True), groups.var((1, 2, 4), keepdims=True)
    return ((groups - mean) / np.sqrt(variance + epsilon)).reshape(x.shape) * layer["scale"] + layer["bias"]


# ------------------------------------------------------------------------------------------ layers


def test_ddpm_time_embedding():
    """get_timestep_embedding of hojonathanho/diffusion, nn.py: sines first, the last frequency 1 / 10,000."""
    t = np.array([0.0, 1.0, 250.5, 999.0])
    angles = t[:, None] * np.exp(np.arange(64) * -(np.log(10000.0) / 63))
    got = unet.sinusoidal(jnp.float32(t), 128)
    np.testing.assert_allclose(got, np.concatenate([np.sin(angles), np.cos(angles)], axis=1), atol=2e-4)


def test_halving_and_doubling():
    x = np.asarray(normals(2, 4, 6, 3))
    np.testing.assert_allclose(adm.halved(x)[1, 1, 2], x[1, 2:4, 4:6].mean((0, 1)), rtol=1e-5)
    doubled = np.asarray(unet.doubled(x))
    for row, column in ((0, 0), (3, 5), (7, 10)):
        np.testing.assert_array_equal(doubled[:, row, column], x[:, row // 2, column // 2])
    np.testing.assert_allclose(adm.halved(doubled), x, rtol=1e-5)


def test_halving_convolution_is_centred_on_even_pixels():
    """torch's padding of 1: the plain convolution, of which every second row and column is left out."""
    x, layer = normals(2, 8, 8, 4), layers.Conv(4, stride=2, padding=1)
    params = filled(layer.init, x)
    plain = layers.Conv(4).apply(params, x)
    np.testing.assert_allclose(layer.apply(params, x), plain[:, ::2, ::2], rtol=1e-4, atol=1e-5)


def only_centre(conv):
    """A 3x3 kernel with its middle alone, and that 1x1 matrix."""
    kernel = np.zeros_like(conv["kernel"])
    kernel[1, 1] = conv["kernel"][1, 1]
    return conv | {"kernel": kernel}, kernel[1, 1]


@pytest.mark.parametrize("scale_shift_norm", [True, False], ids=["scale and shift", "add"])
@pytest.mark.parametrize("resample", [None, adm.halved, unet.doubled], ids=["same", "halved", "doubled"])
def test_residual_block(scale_shift_norm, resample):
    """Nichol & Dhariwal 2021, section 5: GroupNorm(h) (1 + w) + b, or GroupNorm(h + v); Dhariwal & Nichol 2021, 3.

    In float64, with convolutions that see one pixel alone, and an x so small that the norms' 1e-5 shows.
    """
    options = adm.ADMOptions(channels=32, scale_shift_norm=scale_shift_norm)
    block = adm.ResidualBlock(options, 32, 0, jnp.float32, resample)
    x, condition = 0.003 * normals(2, 4, 4, 32), normals(2, 128, seed=3)
    params = filled(block.init, x, condition, None)["params"]
    params["conv_0"], first = only_centre(params["conv_0"])
    params["conv_1"], second = only_centre(params["conv_1"])

    move = (lambda a: np.asarray(resample(jnp.float32(a)), np.float64)) if resample else (lambda a: a)
    h = move(silu(group_norm(x, params["norm_0"], 1e-5))) @ first + params["conv_0"]["bias"]
    vectors = (np.asarray(condition) @ params["condition"]["kernel"] + params["condition"]["bias"])[:, None, None]
    if scale_shift_norm:
        h = group_norm(h, params["norm_1"], 1e-5) * (1.0 + vectors[..., :32]) + vectors[..., 32:]
    else:
        h = group_norm(h + vectors, params["norm_1"], 1e-5)
    expected = move(np.asarray(x)) + silu(h) @ second + params["conv_1"]["bias"]
    np.testing.assert_allclose(block.apply({"params": params}, x, condition, None), expected, rtol=1e-3, atol=1e-3)


def test_attention_has_heads():
    """Softmax attention of each head on its own; columns of qkv: all queries, all keys, all values."""
    x, attention = 0.003 * normals(2, 3, 3, 32), adm.Attention(4, "auto", jnp.float32)
    params = filled(attention.init, x)["params"]
    y = group_norm(x, params["norm"], 1e-5).reshape(2, 9, 32)
    q, k, v = np.split(y @ params["qkv"]["kernel"] + params["qkv"]["bias"], 3, axis=-1)
    heads = []
    for part in (slice(8 * i, 8 * i + 8) for i in range(4)):
        weights = np.exp(q[..., part] @ k[..., part].swapaxes(1, 2) / np.sqrt(8.0))
        heads.append(weights / weights.sum(-1, keepdims=True) @ v[..., part])
    out = np.concatenate(heads, axis=-1) @ params["out"]["kernel"] + params["out"]["bias"]
    expected = np.asarray(x) + out.reshape(x.shape)
    np.testing.assert_allclose(attention.apply({"params": params}, x), expected, rtol=1e-3, atol=1e-3)


BLOCKS = {
    "ddpm": lambda dtype: unet.ResidualBlock(32, 0.0, 0, dtype),
    "scale and shift": lambda dtype: adm.ResidualBlock(adm.ADMOptions(dropout=0.0), 32, 0, dtype),
    "add": lambda dtype: adm.ResidualBlock(adm.ADMOptions(dropout=0.0, scale_shift_norm=False), 32, 0, dtype),
}


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_gradient_of_the_condition_in_bfloat16(block):
    """A sum over 32x32 pixels, which bfloat16 would get wrong by 10 % and more."""
    x, condition, direction = normals(2, 32, 32, 32), normals(2, 64, seed=3), 1.0 + normals(2, 32, 32, 32, seed=4)
    params = filled(block(jnp.float32).init, x, condition, None)

    def gradient(dtype):
        def loss(params):
            y = block(dtype).apply(params, x.astype(dtype), condition.astype(dtype), None)
            return jnp.mean(direction * y.astype(jnp.float32))

        return np.asarray(jax.jit(jax.grad(loss))(params)["params"]["condition"]["kernel"])

    exact = gradient(jnp.float32)
    assert np.linalg.norm(gradient(jnp.bfloat16) - exact) < 0.02 * np.linalg.norm(exact)


# ------------------------------------------------------------------------------------------ networks


def test_no_label_adds_nothing():
    """ADM under the label "none" is the network without labels and with the same other weights."""
    labelled = networks.build("network", SMALL["adm"] + ")", SPEC)
    plain = networks.build("network", SMALL["adm"] + ")", UNLABELLED)
    params = filled(labelled.init)
    x, t = normals(2, *SPEC.shape), jnp.float32([0.2, 0.7])
    y = jax.jit(labelled.apply)(params, x, t, jnp.int32([5, 0]))
    unlabelled = jax.jit(plain.apply)({name: part for name, part in params.items() if name != "label"}, x, t, None)
    np.testing.assert_allclose(y[0], unlabelled[0], atol=1e-5)
    assert np.abs(y[1] - unlabelled[1]).max() > 1e-2


def test_edm_sees_its_own_time():
    """NVlabs/edm's ADM embeds c_noise itself; OpenAI's, the step in 0..1000."""
    steps, noise = (networks.build("network", f"{SMALL['adm']}{o})", UNLABELLED) for o in ("", ",time_scale=1.0"))
    params, x, t = filled(steps.init), normals(2, *SPEC.shape), jnp.float32([0.002, 0.003])
    expected = jax.jit(noise.apply)(params, x, 1000.0 * t, None)
    np.testing.assert_allclose(jax.jit(steps.apply)(params, x, t, None), expected, atol=1e-5)


def equations(jaxpr):
    """Those of a jaxpr and of all jaxprs in it."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@pytest.mark.parametrize("name", SMALL)
def test_a_shared_time_is_embedded_once(name):
    """Products with the condition, which has 128 features and nothing else has, are of one row, not of eight."""
    net = networks.build("network", SMALL[name] + ")", UNLABELLED)
    params = jax.eval_shape(net.init, jax.random.key(0))
    jaxpr = jax.make_jaxpr(net.apply)(params, jnp.zeros((8, *UNLABELLED.shape)), jnp.zeros((1,)), None)
    products = [e.invars for e in equations(jaxpr.jaxpr) if e.primitive.name == "dot_general"]
    rows = [x.aval.shape[0] for x, kernel in products if kernel.aval.shape[0] == 128]
    assert rows == [1] * 6  # the embedding's second layer, and five blocks


@pytest.mark.parametrize("name", ["unet", pytest.param("adm", marks=pytest.mark.slow)])
def test_rematerialisation_changes_no_gradient(name):
    """ "full" runs convolutions again, which "dots" keeps."""
    x, t = normals(2, *UNLABELLED.shape), jnp.float32([0.2, 0.7])
    gradients, convolutions = {}, {}
    for policy in ("none", "full", "dots"):
        net = networks.build("network", f"{SMALL[name]},remat='{policy}')", UNLABELLED)
        params = filled(net.init)
        gradient = jax.grad(lambda params, net=net: jnp.sum(jnp.square(net.apply(params, x, t, None))))
        gradients[policy] = jax.jit(gradient)(params)
        names = [e.primitive.name for e in equations(jax.make_jaxpr(gradient)(params).jaxpr)]
        convolutions[policy] = names.count("conv_general_dilated")
    assert convolutions["full"] > convolutions["none"] == convolutions["dots"]
    for policy in ("full", "dots"):
        for exact, leaf in zip(jax.tree.leaves(gradients["none"]), jax.tree.leaves(gradients[policy]), strict=True):
            np.testing.assert_allclose(leaf, exact, atol=1e-5 * np.abs(exact).max() + 1e-5)


@pytest.mark.parametrize(
    ("text", "size", "says"),
    [
        ("adm(channels=48)", 64, "channels must be a multiple of 32"),
        ("adm(multipliers=())", 64, "multipliers"),
        ("adm(channels=32,multipliers=(1,1.25))", 64, "multipliers"),
        ("adm(multipliers=(1,-1))", 64, "multipliers"),
        ("adm(blocks=0)", 64, "blocks"),
        ("adm(attention=(0.5,))", 64, "attention"),
        ("adm(head_channels=0)", 64, "head_channels"),
        ("adm(heads=-1)", 64, "heads"),
        ("adm(time_scale=0.0)", 64, "time_scale"),
        ("adm(dropout=1.0)", 64, "dropout"),
        ("adm(remat='half')", 64, "remat"),
        ("unet(remat='half')", 32, "remat"),
        ("unet(attention_implementation='flesh')", 32, "attention must be one of"),
        ("adm(attention_implementation='flesh')", 64, "attention must be one of"),
        ("adm(channels=32,multipliers=(1,2),attention=())", 9, "9 pixels"),
        ("adm(channels=32,multipliers=(1,2))", 8, "head_channels = 64 must divide the 32 channels"),
        ("adm(channels=32,multipliers=(1,3),attention=(),heads=5)", 8, "heads = 5 must divide the 96 channels"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(text, size, says):
    with pytest.raises(UserError, match=r"^family.network.*" + says):
        networks.build("family.network", text, ImageSpec(size=size, channels=3, num_classes=0))
