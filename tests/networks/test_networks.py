"""What every network promises: invariances, bfloat16 against float32, dropout by keys."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import networks, rng, tree
from diffusion_jax.errors import UserError
from diffusion_jax.networks import layers, transformer
from diffusion_jax.types import ImageSpec

SPEC = ImageSpec(size=8, channels=3, num_classes=5)
TINY = {
    "adm": "adm(channels=32,multipliers=(1,2),blocks=1,attention=(4,),head_channels=32,dropout=0.0)",
    "ddpmpp": "ddpmpp(channels=32,multipliers=(1,2),blocks=1,attention=(),embedding='fourier',encoder='residual')",
    "dit": "dit(patch=2,width=32,depth=2,heads=2)",
    "edm2": "edm2(channels=32,multipliers=(1,2),blocks=1,attention=(4,),head_channels=16,log_variance=0)",
    "unet": "unet(channels=32,multipliers=(1,2),blocks=1,attention=(4,),dropout=0.0)",
    "uvit": "uvit(patch=2,width=32,depth=2,heads=2)",
    "vdm": "vdm(channels=32,depth=1,fourier=(1.0,),dropout=0.0)",
}
DROPPING = {
    "adm": "adm(channels=32,multipliers=(1,),blocks=1,attention=(),heads=1,dropout=0.5)",
    "ddpmpp": "ddpmpp(channels=32,multipliers=(1,),blocks=1,attention=(),time_scale=1000.0,dropout=0.5)",
    "dit": "dit(patch=4,width=32,depth=1,heads=2,dropout=0.5)",
    "edm2": "edm2(channels=32,multipliers=(1,),blocks=1,attention=(),head_channels=16,log_variance=0,dropout=0.5)",
    "unet": "unet(channels=32,multipliers=(1,),blocks=1,attention=(),dropout=0.5)",
    "uvit": "uvit(patch=4,width=32,depth=2,heads=2,dropout=0.5)",
    "vdm": "vdm(channels=32,depth=1,fourier=(1.0,),dropout=0.5)",
}
FORMS = (
    "conditioning='adaln',shared_modulation=True,scan=True",
    "conditioning='in_context',rope=True,qk_norm=True,mlp='swiglu',norm='rms',registers=2",
    "conditioning='cross_attention',remat='dots'",
)
for form in FORMS:
    TINY[f"dit {form}"] = TINY["dit"].replace(")", f",{form})")
    DROPPING[f"dit {form}"] = DROPPING["dit"].replace(")", f",{form})")


def test_every_backbone_is_tested_here():
    assert {name.split()[0] for name in TINY} == set(networks.BACKBONES)


pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(params=[pytest.param(n, marks=[] if n in networks.BACKBONES else pytest.mark.slow) for n in TINY])
def name(request):
    return request.param


@functools.cache
def network(text, precision="float32"):
    """(parameters, drawn at random so that nothing is 0 any more; the compiled apply)."""
    net = networks.build("family.network", text, SPEC, precision)
    generator = np.random.default_rng(1)

    def draw(leaf):
        """Weights of a layer with n inputs about 1 / sqrt(n); biases, scales and labels about 0.3."""
        spread = 0.3 if leaf.ndim == 1 else np.prod(leaf.shape[:-1]) ** -0.5
        return jnp.asarray(spread * generator.normal(size=leaf.shape), leaf.dtype)

    with jax.numpy_dtype_promotion("standard"):  # jax's own attention mixes bfloat16 and float32
        return jax.tree.map(draw, jax.eval_shape(net.init, jax.random.key(0))), jax.jit(net.apply)


def inputs(batch=4):
    x = jnp.asarray(np.random.default_rng(2).normal(size=(batch, *SPEC.shape)), jnp.float32)
    return x, jnp.linspace(0.1, 0.9, batch), jnp.arange(batch) % SPEC.num_classes


# ------------------------------------------------------------------------------------------ at initialisation


@pytest.mark.parametrize("name", [name for name in TINY if name != "uvit"])
def test_output_is_zero_at_initialisation(name):
    """adaLN-Zero (Peebles & Xie 2022, section 3.2) and DDPM's last convolution: the first prediction is 0.

    VDM's is its input, to which the last convolution is added. EDM draws DDPM++'s last weights a hundred thousandth of
    Xavier's size, so that it is about 1e-5. U-ViT's last layers are drawn like all others.
    """
    net = networks.build("family.network", TINY[name], SPEC)
    x, t, label = inputs()
    key = jax.random.key(0, impl="rbg")  # compiles in a tenth of threefry's time
    y = jax.jit(net.apply)(jax.jit(net.init)(key), x, t, label, None)
    assert y.shape == (4, 8, 8, 3)
    expected = x if name == "vdm" else jnp.zeros_like(x)
    np.testing.assert_allclose(y, expected, rtol=0.0, atol=1e-4 if name == "ddpmpp" else 0.0)


# ------------------------------------------------------------------------------------------ invariances


@pytest.mark.parametrize("spec", [SPEC, ImageSpec(size=16, channels=1, num_classes=0)], ids=["labels", "none"])
def test_shape(name, spec):
    net = networks.build("family.network", TINY[name], spec, channels_out=7)
    params = jax.eval_shape(net.init, jax.random.key(0))
    label = jax.ShapeDtypeStruct((2,), jnp.int32) if spec.num_classes else None
    x, t = jax.ShapeDtypeStruct((2, *spec.shape), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.float32)
    y = jax.eval_shape(net.apply, params, x, t, label)
    assert (y.shape, y.dtype) == ((2, spec.size, spec.size, 7), jnp.float32)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))


def test_one_time_serves_all_examples(name):
    params, apply = network(TINY[name])
    x, _, label = inputs()
    one = apply(params, x, jnp.float32([0.3]), label, None)
    np.testing.assert_allclose(one, apply(params, x, jnp.full((4,), 0.3), label, None), atol=1e-5)


@pytest.mark.parametrize("text", [*TINY.values(), *DROPPING.values()])
def test_examples_do_not_see_each_other(text):
    """Another image, time or label at place 1 changes the output at place 1, and nowhere else.

    At 32 channels too, where norms of one channel a group would take the condition away again.
    """
    params, apply = network(text)
    x, t, label = inputs()
    whole = np.asarray(apply(params, x, t, label, None))
    others = {
        "image": (x.at[1].add(1.0), t, label),
        "time": (x, t.at[1].add(0.2), label),
        "label": (x, t, label.at[1].set(4)),
        "no label": (x, t, label.at[1].set(SPEC.num_classes)),
    }
    for what, changed in others.items():
        y = np.asarray(apply(params, *changed, None))
        np.testing.assert_allclose(y[[0, 2, 3]], whole[[0, 2, 3]], atol=1e-5, err_msg=what)
        assert np.abs(y[1] - whole[1]).max() > 1e-2, what
    np.testing.assert_allclose(apply(params, x[::-1], t[::-1], label[::-1], None), whole[::-1], atol=1e-5)


def test_every_pixel_sees_every_other(name):
    """Attention, or enough convolutions: a change in one corner reaches the opposite one."""
    params, apply = network(TINY[name])
    x, t, label = inputs()
    moved = np.asarray(apply(params, x.at[:, 0, 0].add(3.0), t, label, None) - apply(params, x, t, label, None))
    assert np.abs(moved[:, -1, -1]).min() > 1e-5


# ------------------------------------------------------------------------------------------ layers and bfloat16


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_layer_norm(dtype):
    """Statistics in float32 whatever the input: a mean 30 times the spread costs bfloat16 statistics all digits."""
    x = (30.0 + jax.random.normal(jax.random.key(0), (3, 256))).astype(dtype)
    exact = np.asarray(x, np.float64)
    expected = (exact - exact.mean(-1, keepdims=True)) / np.sqrt(exact.var(-1, keepdims=True) + 1e-6)
    y = transformer.Norm("layer", 1e-6).apply({}, x, jnp.zeros((1, 256)), jnp.zeros((1, 256)))
    assert y.dtype == dtype
    np.testing.assert_allclose(
        np.asarray(y, np.float64), expected, rtol=1e-4 if dtype == jnp.float32 else 2**-8, atol=1e-4
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("channels", "groups"), [(128, 32), (64, 16)])
def test_group_norm(channels, groups, dtype):
    """Wu & He 2018, eq. 1 to 3, then scale and bias. 32 groups, as DDPM's, of at least 4 channels, as NVlabs/edm's."""
    generator = np.random.default_rng(0)
    x = jnp.asarray(30.0 + generator.normal(size=(2, 6, 6, channels)), dtype)
    scale, bias = generator.normal(size=(2, channels))
    exact = np.asarray(x, np.float64).reshape(2, 36, groups, -1)
    mean, variance = exact.mean((1, 3), keepdims=True), exact.var((1, 3), keepdims=True)
    expected = ((exact - mean) / np.sqrt(variance + 1e-6)).reshape(x.shape) * scale + bias
    y = layers.GroupNorm().apply({"params": {"scale": jnp.float32(scale), "bias": jnp.float32(bias)}}, x)
    assert y.dtype == dtype
    rounding = 2**-8 if dtype == jnp.bfloat16 else 1e-4
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=rounding, atol=1e-4)


GRADIENT_TOLERANCE = 0.02
"""bfloat16 has 8 bits: a product is off by up to 0.4 %, a dozen in a row by 1 %, at random. A bias gradient that
is summed in bfloat16 is off by 24 % and more."""


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in ("dit", "unet") else pytest.mark.slow) for n in TINY]
)
def test_gradients_in_bfloat16_are_those_of_float32(name):
    """Of every parameter, in the norm, and with it the output. Enough rows that a sum in bfloat16 would show."""
    shallow = TINY[name].replace("(1,2)", "(1,)").replace("attention=(4,)", "attention=(8,)")
    x, t, label = inputs(16)
    direction = 1.0 + jax.random.normal(jax.random.key(5), x.shape)

    def gradient(precision):
        params, apply = network(shallow, precision)

        def loss(params):
            y = apply(params, x, t, label, None)
            return jnp.mean(direction * y), y

        with jax.numpy_dtype_promotion("standard"):
            return jax.jit(jax.grad(loss, has_aux=True))(params)

    (exact, exact_y), (ours, y) = gradient("float32"), gradient("bfloat16")
    assert y.dtype == jnp.float32
    assert 1e-4 < np.linalg.norm(y - exact_y) / np.linalg.norm(exact_y) < GRADIENT_TOLERANCE  # it was in bfloat16
    size = {
        tree.path_name(path): float(np.linalg.norm(leaf)) for path, leaf in jax.tree_util.tree_leaves_with_path(exact)
    }
    error = jax.tree.leaves(jax.tree.map(lambda a, b: float(np.linalg.norm(a - b)), ours, exact))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(ours))
    bad = {}
    for (path, norm), off in zip(size.items(), error, strict=True):
        if path.endswith("/k/bias"):  # a softmax does not change with it: its gradient is 0, next to the queries'
            assert norm < 1e-4 * size[path.replace("/k/", "/q/")], path
            norm = size[path.replace("/k/", "/q/")]
        if path.endswith("/gain"):  # one number: a sum that may be near 0 by chance, next to the matrix it multiplies
            norm = size[path.replace("/gain", "/condition/kernel")]
        assert norm > 0.0, path  # no layer is cut off
        if not off < GRADIENT_TOLERANCE * norm:
            bad[path] = off / norm
    assert not bad


# ------------------------------------------------------------------------------------------ dropout


def example_keys(count, seed=0):
    return rng.example_keys(jax.random.key(seed), jnp.arange(count))


def test_dropout_keeps_the_mean():
    """200,000 entries at rate 0.3: the mean of ones is 1 +- 0.0015, and what is kept is 1 / 0.7."""
    y = np.asarray(layers.dropout(jnp.ones((20, 10_000)), 0.3, example_keys(20), layer=0))
    np.testing.assert_allclose(y.mean(), 1.0, atol=0.006)
    np.testing.assert_allclose(np.unique(y), [0.0, 1.0 / 0.7], rtol=1e-6)
    rows = (y == 0.0).mean(1)
    assert rows.std() < 0.01  # every example loses its share


def test_dropout_is_off_without_keys():
    x = jax.random.normal(jax.random.key(0), (2, 8))
    np.testing.assert_array_equal(layers.dropout(x, 0.9, None, layer=0), x)
    np.testing.assert_array_equal(layers.dropout(x, 0.0, example_keys(2), layer=0), x)


def test_layers_and_examples_drop_independently():
    ones, keys = jnp.ones((2, 4000)), example_keys(2)
    first, second = (np.asarray(layers.dropout(ones, 0.5, keys, layer=i)) > 0 for i in (0, 1))
    for a, b in ((first[0], first[1]), (first[0], second[0]), (first[1], second[1])):
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.07  # 4 standard errors


def test_what_an_example_loses_does_not_depend_on_its_batch(name):
    params, apply = network(DROPPING[name])
    x, t, label = inputs()
    keys = example_keys(4)
    whole = np.asarray(apply(params, x, t, label, keys))
    turned = np.asarray(apply(params, x[::-1], t[::-1], label[::-1], keys[::-1]))
    np.testing.assert_allclose(turned[::-1], whole, atol=1e-5)
    other = np.asarray(apply(params, x, t, label, keys.at[2].set(jax.random.key(99))))
    np.testing.assert_allclose(other[[0, 1, 3]], whole[[0, 1, 3]], atol=1e-5)
    assert np.abs(other[2] - whole[2]).max() > 1e-2


def test_network_without_keys_drops_nothing(name):
    """Two networks that differ in their rate alone agree where no keys are given, and do not where they are."""
    params, apply = network(DROPPING[name])
    _, plain = network(DROPPING[name].replace("dropout=0.5", "dropout=0.0"))
    np.testing.assert_array_equal(apply(params, *inputs(), None), plain(params, *inputs(), None))
    assert not np.allclose(apply(params, *inputs(), example_keys(4)), plain(params, *inputs(), None), atol=1e-2)


# ------------------------------------------------------------------------------------------ what does not fit


@pytest.mark.parametrize(
    ("text", "size", "says"),
    [
        ("dit(patch=3)", 8, "patch = 3 must divide the image size 8"),
        ("dit(patch=2)", 9, "patch = 2 must divide the image size 9"),
        ("dit(width=30,heads=3)", 8, "width"),
        ("dit(width=32,heads=3)", 8, "heads"),
        ("dit(depth=0)", 8, "depth"),
        ("dit(dropout=1.0)", 8, "dropout"),
        ("dit(conditioning='adaln_one')", 8, "conditioning must be one of adaln_zero, adaln"),
        ("dit(conditioning='in_context',shared_modulation=True)", 8, "shared_modulation needs adaln"),
        ("dit(rope=True,width=36,heads=6)", 8, "rope"),
        ("dit(registers=-1)", 8, "registers"),
        ("dit(mlp='relu')", 8, "mlp must be one of gelu"),
        ("dit(norm='batch')", 8, "norm must be one of layer"),
        ("dit(epsilon=0.0)", 8, "epsilon"),
        ("dit(attention='flash')", 8, "attention must be one of auto"),
        ("dit(remat='half')", 8, "remat must be one of none"),
        ("uvit(depth=3)", 8, "depth must be even"),
        ("uvit(patch=3)", 8, "patch = 3 must divide the image size 8"),
        ("uvit(heads=7)", 8, "heads = 7"),
        ("unet(multipliers=(1,2,2))", 10, "10 pixels"),
        ("unet(attention=(7,))", 32, "attention = 7 is none of 32, 16, 8, 4, 2, 1"),
        ("adm(attention=(32,12))", 64, "attention = 12 is none of 64, 32, 16, 8, 4, 2, 1"),
        ("unet(channels=48)", 8, "32"),
        ("unet(multipliers=())", 8, "multipliers"),
        ("unet(multipliers=(1,0))", 8, "multipliers"),
        ("unet(multipliers=(1,1.5))", 8, "multipliers"),
        ("unet(blocks=0)", 8, "blocks"),
        ("unet(dropout=-0.1)", 8, "dropout"),
        ("dit(colour=3)", 8, "colour"),
        ("resnet", 8, "resnet"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(text, size, says):
    with pytest.raises(UserError, match=r"^family.network.*" + says):
        networks.build("family.network", text, ImageSpec(size=size, channels=3, num_classes=0))
