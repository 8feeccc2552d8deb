"""The transformer block against a statement of it in NumPy; DiT's parts against the papers'."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import networks, rng, tree
from diffusion_jax.networks import dit, flops, layers, transformer
from diffusion_jax.networks.presets import PRESETS
from diffusion_jax.networks.transformer import Block, BlockOptions
from diffusion_jax.types import ImageSpec

SPEC = ImageSpec(size=8, channels=3, num_classes=5)
TINY = "dit(patch=2,width=32,depth=3,heads=2)"


pytestmark = pytest.mark.usefixtures("quick_compilation")


def draw(shapes, seed=0):
    """Parameters at random, so that nothing is 0."""
    generator = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(0.2 * generator.normal(size=leaf.shape), leaf.dtype), shapes)


def network(options="", spec=SPEC):
    """(drawn parameters, apply) of a tiny DiT with `options`."""
    net = networks.build("family.network", TINY.replace(")", f",{options})"), spec)
    return draw(jax.eval_shape(net.init, jax.random.key(0))), net.apply


def inputs(batch=4):
    x = jnp.asarray(np.random.default_rng(2).normal(size=(batch, *SPEC.shape)), jnp.float32)
    return x, jnp.linspace(0.1, 0.9, batch), jnp.arange(batch)


# ------------------------------------------------------------------------------------------ the block


def numpy_block(p, o, x, condition, context, angles, vectors, shared):
    """Of the equations at the top of transformer.py, in float64, head by head."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), p)
    dense = lambda name, y: y @ p[name]["kernel"] + p[name].get("bias", 0.0)

    def norm(name, y, shift=None, scale=None):
        centred = y - y.mean(-1, keepdims=True) if o.norm == "layer" else y
        y = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + o.epsilon)
        scale = p[name]["scale"] if scale is None else scale
        shift = p.get(name, {}).get("shift", 0.0) if shift is None else shift
        return y * (1.0 + scale) + shift

    def attend(q, k, v, itself=False):
        out = np.zeros_like(q)
        d = q.shape[-1] // o.heads
        for h in range(o.heads):
            own = slice(h * d, (h + 1) * d)
            a, b = q[..., own], k[..., own]
            if itself and o.qk_norm:
                a, b = (
                    y / np.sqrt((y**2).mean(-1, keepdims=True) + o.epsilon) * (1.0 + p[name]["scale"])
                    for y, name in ((a, "q_norm"), (b, "k_norm"))
                )
            if itself and angles is not None:
                half = lambda y: y[..., : d // 2] + 1j * y[..., d // 2 :]
                a, b = (half(y) * np.exp(1j * np.asarray(angles, np.float64)) for y in (a, b))
                a, b = (np.concatenate([y.real, y.imag], -1) for y in (a, b))
            weights = np.exp(a @ b.swapaxes(-1, -2) / math.sqrt(d))
            out[..., own] = weights / weights.sum(-1, keepdims=True) @ v[..., own]
        return out

    given = [[None] * 3, [None] * 3]
    if vectors:
        flat = condition if shared else dense("modulation", condition)
        flat = flat.reshape(len(flat), 1, 2, vectors, -1) + (p["table"] if shared else 0.0)
        given = [[*(flat[:, :, branch, i] for i in range(vectors)), None][:3] for branch in range(2)]
    (shift, scale, gate), (shift_m, scale_m, gate_m) = given

    y = attend(*np.split(dense("qkv", norm("attention_norm", x, shift, scale)), 3, axis=-1), itself=True)
    x = x + (1.0 if gate is None else gate) * dense("attention_out", y)
    if context is not None:
        k, v = np.split(np.repeat(dense("cross_kv", context), len(x) // len(context), 0), 2, axis=-1)
        x = x + dense("cross_out", attend(dense("cross_q", norm("cross_norm", x)), k, v))
    y = dense("mlp_in", norm("mlp_norm", x, shift_m, scale_m))
    if o.mlp == "swiglu":
        a, b = np.split(y, 2, axis=-1)
        y = a / (1.0 + np.exp(-a)) * b
    elif o.mlp == "gelu":  # Hendrycks & Gimpel 2016
        y = 0.5 * y * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (y + 0.044715 * y**3)))
    else:
        y = 0.5 * y * (1.0 + np.vectorize(math.erf)(y / math.sqrt(2.0)))
    return x + (1.0 if gate_m is None else gate_m) * dense("mlp_out", y)


@pytest.mark.parametrize(
    ("vectors", "shared", "cross", "turned", "options"),
    [
        (3, False, False, False, {}),
        (2, False, False, False, {"epsilon": 0.1}),
        (3, True, False, True, {"qk_norm": True, "mlp": "swiglu", "norm": "rms"}),
        (0, False, True, False, {"mlp": "gelu_erf", "qkv_bias": False}),
        (0, False, True, True, {"norm": "rms"}),
    ],
    ids=["adaln_zero", "adaln", "shared", "cross", "rms"],
)
def test_block_is_its_equations(vectors, shared, cross, turned, options):
    o = BlockOptions(width=16, heads=2, mlp_ratio=3.0, **options)
    generator = np.random.default_rng(1)
    array = lambda *shape: jnp.asarray(generator.normal(size=shape), jnp.float32)
    condition = array(2, 6 * 16 if shared else 16) if vectors else None
    x, context = array(2, 6, 16), array(1, 3, 16) if cross else None
    angles = transformer.angles_2d(2, 3, 8) if turned else None
    block = Block(o, jnp.float32, vectors, shared)
    given = (x, 0, None, condition, context, transformer.turns(angles) if turned else None)
    params = draw(jax.eval_shape(block.init, jax.random.key(0), *given))
    ours = jax.jit(lambda params: block.apply(params, *given))(params)
    expected = numpy_block(
        params["params"],
        o,
        *(None if a is None else np.asarray(a, np.float64) for a in (x, condition, context)),
        angles,
        vectors,
        shared,
    )
    np.testing.assert_allclose(ours, expected, atol=2e-5)


def test_rotated_products_depend_on_the_distance_alone():
    """In rows and in columns: q at (r, c) times k at (r', c') is one number for every pair as far apart."""
    height, width, d = 4, 5, 12
    rotation = transformer.turns(transformer.angles_2d(height, width, d))
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, d))
    turned = lambda x: transformer.rotate(jnp.broadcast_to(x, (1, height * width, 1, d)), rotation)[0, :, 0]
    products = np.asarray(turned(q) @ turned(k).T).reshape(height, width, height, width)
    np.testing.assert_allclose(products[:-1, :-1, :-1, :-1], products[1:, 1:, 1:, 1:], atol=1e-5)
    assert np.ptp(products[0, 0]) > 0.1
    np.testing.assert_allclose(products[0, 0, 0, 0], np.vdot(q, k), rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(turned(q), axis=-1), np.linalg.norm(q), rtol=1e-5)


@pytest.mark.parametrize("options", ["", "shared_modulation=True"])
def test_blocks_are_the_identity_at_initialisation(options):
    """adaLN-Zero: what the output layer is shown is the normalised patch, whatever the depth."""
    net = networks.build("family.network", TINY.replace(")", f",{options})"), SPEC)
    params = jax.jit(net.init)(jax.random.key(0))
    params["patch_out"] = draw(params["patch_out"])
    x, t, label = inputs()
    tokens = transformer.cut(x, 2) @ params["patch_in"]["kernel"] + dit.positions_2d(4, 4, 32)[None]
    centred = tokens - tokens.mean(-1, keepdims=True)
    tokens = centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    y = tokens @ params["patch_out"]["kernel"] + params["patch_out"]["bias"][None, None]
    np.testing.assert_allclose(transformer.cut(net.apply(params, x, t, label), 2), y, atol=1e-5)


# ------------------------------------------------------------------------------------------ sizes and work


@pytest.mark.parametrize(
    ("options", "millions", "gigaflops"),
    [
        ("", 675, 118.64),
        ("conditioning='adaln'", 600, 118.56),
        ("conditioning='in_context'", 449, 119.37),
        ("conditioning='cross_attention'", 598, 137.62),
    ],
)
def test_published_sizes_of_all_ways_of_conditioning(options, millions, gigaflops):
    """DiT-XL/2 of Peebles & Xie 2022, Table 4, last rows."""
    image = PRESETS["dit-xl/2"].image
    net = networks.build("family.network", f"dit-xl/2({options})", image, channels_out=8)
    count = tree.count(jax.eval_shape(net.init, jax.random.key(0))) + net.fixed
    assert abs(count / 1e6 - millions) < 1.0
    np.testing.assert_allclose(flops.multiply_adds(net, image) / 1e9, gigaflops, rtol=5e-4)


def test_one_modulation_for_all_saves_a_quarter():
    """PixArt-alpha, section 2.3: 6 width^2 a block become a table of 6 width."""
    own, one = (tree.count(network(options)[0]) for options in ("", "shared_modulation=True"))
    assert own - one == (3 - 1) * 6 * 32 * 33 - 3 * 6 * 32


def test_a_condition_of_one_row_is_computed_once():
    """With the time shared and no label, 4 images cost the time's MLP and the modulations once, not 4 times."""
    params, apply = network(spec=ImageSpec(size=8, channels=3, num_classes=0))
    work = lambda rows: flops.multiply_adds_of(apply, params, inputs()[0], jnp.ones((rows,)), None)
    w, depth = 32, 3
    assert work(4) - work(1) == 3 * (256 * w + w * w + depth * 6 * w * w + 2 * w * w)


# ------------------------------------------------------------------------------------------ scan and rematerialisation


@functools.cache
def value_and_gradient(options="", stack=lambda params: params):
    """Of the mean square of the output, by the same parameters without scan, with dropout."""
    params, _ = network("dropout=0.3")
    apply = network(f"dropout=0.3,{options}")[1]
    keys = rng.example_keys(jax.random.key(3), jnp.arange(4))
    loss = lambda params: jnp.mean(apply(stack(params), *inputs(), keys) ** 2)
    return jax.jit(jax.value_and_grad(loss))(params)


def assert_same(ours, theirs):
    """To the accuracy of float32: gradients are up to 1."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6), ours, theirs)


def stacked(params):
    """Of a network without scan, as one with it has them."""
    blocks = [params[f"block_{i}"] for i in range(3)]
    rest = {name: leaf for name, leaf in params.items() if not name.startswith("block_")}
    return rest | {"blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)}


@pytest.mark.parametrize("policy", ["none", "full"])
def test_scan_is_the_same_function(policy):
    """Values and gradients, with dropout, given the same parameters."""
    assert_same(value_and_gradient(f"scan=True,remat={policy!r}", stacked), value_and_gradient())


def test_scan_draws_every_block_anew():
    net = networks.build("family.network", TINY.replace(")", ",scan=True)"), SPEC)
    kernel = np.asarray(jax.jit(net.init)(jax.random.key(0))["blocks"]["qkv"]["kernel"])
    assert kernel.shape == (3, 32, 96)
    assert abs(np.corrcoef(kernel[0].ravel(), kernel[1].ravel())[0, 1]) < 0.08  # 4 standard errors
    np.testing.assert_allclose(kernel.std((1, 2)), math.sqrt(2.0 / (32 + 96)), rtol=0.05)  # Xavier's, of one block


def products(options, depth):
    """Matrix products in the program of a gradient, those of a scan's body once."""
    text = TINY.replace("depth=3", f"depth={depth}").replace(")", f",{options})")
    net = networks.build("family.network", text, SPEC)
    params = jax.eval_shape(net.init, jax.random.key(0))
    loss = lambda params: jnp.sum(net.apply(params, *inputs()))
    return str(jax.make_jaxpr(jax.grad(loss))(params)).count(" dot_general[")


def test_the_scanned_program_does_not_grow_with_the_depth():
    assert products("scan=True", 3) == products("scan=True", 30)
    assert products("", 6) > 1.5 * products("", 3)


@pytest.mark.parametrize("policy", ["full", "dots"])
def test_rematerialisation_does_not_change_anything(policy):
    assert_same(value_and_gradient(f"remat={policy!r}"), value_and_gradient())


def test_what_is_computed_again():
    """Of a block's 7 products (modulation, qkv, q k^T, w v, out, and 2 in the MLP) all, or the 2 without weights."""
    none, dots, full = (products(f"remat={policy!r}", 3) for policy in ("none", "dots", "full"))
    assert dots - none == 3 * 2
    assert full - none == 3 * 7


# ------------------------------------------------------------------------------------------ around the blocks


def test_patches_are_cut_and_joined_in_place():
    """A DiT whose blocks do nothing maps each patch on its own: a pixel reaches its own patch alone."""
    net = networks.build("family.network", TINY, SPEC)
    params = jax.jit(net.init)(jax.random.key(0))
    params["patch_out"] = jax.tree.map(lambda p: p + jax.random.normal(jax.random.key(1), p.shape), params["patch_out"])
    x, t, label = inputs()
    apply = jax.jit(net.apply)
    for row, column in ((0, 0), (3, 5), (7, 2)):
        moved = apply(params, x.at[:, row, column].add(1.0), t, label, None) - apply(params, x, t, label, None)
        rows, columns = np.nonzero(np.abs(np.asarray(moved)).max((0, 3)))
        assert set(rows // 2) == {row // 2}
        assert set(columns // 2) == {column // 2}


def sincos(width, positions):
    """get_1d_sincos_pos_embed_from_grid of facebookresearch/DiT, models.py."""
    omega = 1.0 / 10000 ** (np.arange(width // 2, dtype=np.float64) / (width / 2.0))
    out = np.outer(positions.reshape(-1), omega)
    return np.concatenate([np.sin(out), np.cos(out)], axis=1)


@pytest.mark.parametrize(("height", "width", "features"), [(16, 16, 384), (4, 4, 32), (3, 5, 16)])
def test_positions_are_the_published_ones(height, width, features):
    """get_2d_sincos_pos_embed: "here w goes first"."""
    grid = np.stack(np.meshgrid(np.arange(width), np.arange(height)))
    published = np.concatenate([sincos(features // 2, grid[0]), sincos(features // 2, grid[1])], axis=1)
    np.testing.assert_allclose(dit.positions_2d(height, width, features), published, atol=2e-5)


def test_time_embedding_is_the_published_one():
    """timestep_embedding of facebookresearch/DiT (from ADM): cosines, then sines, of t in 0..1000."""
    t = np.array([0.0, 1.0, 250.5, 999.0])
    angles = t[:, None] * np.exp(-np.log(10000.0) * np.arange(128) / 128)
    got = layers.sinusoidal(jnp.float32(t), 256)
    np.testing.assert_allclose(got, np.concatenate([np.cos(angles), np.sin(angles)], axis=1), atol=2e-4)
