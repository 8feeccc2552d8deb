"""EDM2: magnitudes that every layer preserves, weights on their sphere, and the head that learns the loss's size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import families, networks, rng, tree
from diffusion_jax.errors import UserError
from diffusion_jax.networks import edm2
from diffusion_jax.settings import TrainSettings
from diffusion_jax.training.step import Trainer
from diffusion_jax.types import Context, ImageSpec
from tests.arrays import normals

SPEC = ImageSpec(size=8, channels=3, num_classes=5)
SIZES = "channels=32,multipliers=(1,2),blocks=1,attention=(4,),head_channels=16"


pytestmark = pytest.mark.usefixtures("quick_compilation")


def mean_square(x):
    return float(jnp.mean(jnp.square(x)))


# ------------------------------------------------------------------------------------------ magnitudes


def test_silu_keeps_the_magnitude():
    """The integral of silu(x)^2 under a standard normal, by Gauss's quadrature, is 0.596^2."""
    x, weights = np.polynomial.hermite_e.hermegauss(100)
    integral = np.sum(weights * np.square(x / (1.0 + np.exp(-x)))) / np.sum(weights)
    assert np.sqrt(integral) == pytest.approx(0.596, abs=5e-4)
    assert mean_square(edm2.mp_silu(normals(200_000))) == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
def test_sum_keeps_the_magnitude(t):
    """((1 - t) a + t b) / sqrt((1 - t)^2 + t^2): t is the ratio of the parts, and the mean square stays 1."""
    a, b = normals(2, 100_000)
    y = edm2.mp_sum(a, b, t)
    assert mean_square(y) == pytest.approx(1.0, abs=0.02)
    np.testing.assert_allclose(y, ((1 - t) * a + t * b) / np.sqrt((1 - t) ** 2 + t**2), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("t", [0.3, 0.5])
def test_concatenation_keeps_the_magnitude_and_the_shares(t):
    """Whatever their widths: 16 channels weigh (1 - t)^2 to the t^2 of 96, and the mean square of all 112 is 1."""
    a, b = normals(20_000, 16), normals(20_000, 96, seed=1)
    y = edm2.mp_concat(a, b, t)
    assert mean_square(y) == pytest.approx(1.0, abs=0.02)
    first, second = jnp.sum(jnp.square(y[:, :16])), jnp.sum(jnp.square(y[:, 16:]))
    assert float(first / second) == pytest.approx((1 - t) ** 2 / t**2, rel=0.03)


@pytest.mark.parametrize("length", [0.01, 1.0, 40.0])
def test_dense_and_convolution_keep_the_magnitude(length):
    """Whatever the length of their weights. A convolution's edges see zeros, which have none."""
    for layer, x in ((edm2.Dense(64), normals(2000, 48)), (edm2.Conv(64), normals(20, 12, 12, 48))):
        params = layer.init(jax.random.key(0), x)
        y = layer.apply(jax.tree.map(lambda w: length * w, params), x)
        inside = y if y.ndim == 2 else y[:, 1:-1, 1:-1]
        assert mean_square(inside) == pytest.approx(1.0, abs=0.06)


@pytest.mark.parametrize("encoder", [True, False])
@pytest.mark.parametrize("widths", [(64, 64), (64, 128)])
def test_a_block_keeps_the_magnitude(encoder, widths):
    """At its initialisation, where the condition does nothing yet, and away from the edges."""
    before, after = widths
    block = edm2.Block(edm2.EDM2Options(), after, 0, encoder, 0, jnp.float32)
    x, condition = normals(8, 16, 16, before), normals(1, 32, seed=1)
    params = block.init(jax.random.key(0), x, condition, None)
    y = block.apply(params, x, condition, None)
    assert y.shape == (8, 16, 16, after)
    assert mean_square(y[:, 2:-2, 2:-2]) == pytest.approx(1.0, abs=0.06)
    if encoder:  # each pixel's vector is brought to one length first
        np.testing.assert_allclose(block.apply(params, 7.0 * x, condition, None), y, atol=2e-3)


def test_the_condition_scales_what_a_block_does():
    """With its gain the block's branch is scaled by 1 + gain * condition, in the mean square by 1 + gain^2."""
    block = edm2.Block(edm2.EDM2Options(), 64, 0, True, 0, jnp.float32)
    x, condition = normals(8, 8, 8, 64), normals(8, 32, seed=1)
    params = block.init(jax.random.key(0), x, condition, None)
    other = normals(8, 32, seed=2)
    same = block.apply(params, x, other, None)
    np.testing.assert_array_equal(block.apply(params, x, condition, None), same)
    params["params"]["gain"] = jnp.float32(1.0)
    assert float(jnp.abs(block.apply(params, x, other, None) - same).max()) > 0.1
    scale = 1.0 + edm2.Dense(64).apply({"params": params["params"]["condition"]}, normals(2000, 32, seed=3))
    assert mean_square(scale) == pytest.approx(2.0, abs=0.1)


def test_attention_compares_directions():
    """NumPy's, on what the same block without attention gives: q, k, v are brought to one length, per head and pixel.

    The channels of one matrix are ordered as the published ones: by head, then within it, then q, k and v.
    """
    with_heads, without = (edm2.Block(edm2.EDM2Options(), 32, n, False, 0, jnp.float32) for n in (2, 0))
    x, condition = 5.0 * normals(1, 3, 3, 32), normals(1, 16, seed=1)
    params = with_heads.init(jax.random.key(0), x, condition, None)
    z = np.asarray(without.apply(params, x, condition, None)).reshape(9, 32)
    direction = lambda w: np.asarray(w) / np.linalg.norm(w, axis=0)
    y = (z @ direction(params["params"]["qkv"]["kernel"])).reshape(9, 2, 16, 3)
    y = y / np.sqrt(np.mean(np.square(y), axis=2, keepdims=True))
    q, k, v = np.moveaxis(y, 3, 0)
    weights = np.exp(np.einsum("thd,shd->hts", q, k) / 4.0)
    weights = weights / weights.sum(-1, keepdims=True)
    y = np.einsum("hts,shd->thd", weights, v).reshape(9, 32)
    y = y @ direction(params["params"]["attention_out"]["kernel"])
    expected = (0.7 * z + 0.3 * y) / np.hypot(0.7, 0.3)
    got = np.asarray(with_heads.apply(params, x, condition, None)).reshape(9, 32)
    np.testing.assert_allclose(got, expected, atol=2e-3)


def test_fourier_features_have_the_covariance_of_a_normal_spectrum():
    """E 2 cos(2 pi (f t + phi)) cos(2 pi (f s + phi)) = E cos(2 pi f (t - s)) = exp(-2 pi^2 (t - s)^2)."""
    t = jnp.array([-1.1, -0.2, -0.1, 0.0, 0.05, 0.3])
    y = np.asarray(edm2.fourier(t, 40_000))
    gaps = np.asarray(t)[:, None] - np.asarray(t)
    np.testing.assert_allclose(y @ y.T / 40_000, np.exp(-2.0 * np.pi**2 * gaps**2), atol=0.02)


def test_averages_and_copies_of_pixels():
    x = normals(2, 4, 4, 3)
    np.testing.assert_allclose(edm2.halved(x)[:, 1, 0], np.asarray(x)[:, 2:4, 0:2].mean((1, 2)), rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------ weights


def network(options="", spec=SPEC):
    return networks.build("family.network", f"edm2({SIZES}{options})", spec)


@pytest.fixture(scope="module")
def drawn():
    """(network, its compiled apply, parameters of which none is 0)."""
    net = network()
    shapes = jax.eval_shape(net.init, jax.random.key(0))
    leaves, structure = jax.tree.flatten(shapes)
    values = [
        jnp.float32(0.5) if not leaf.ndim else 3.0 * normals(*leaf.shape, seed=i) for i, leaf in enumerate(leaves)
    ]
    return net, jax.jit(net.apply), jax.tree.unflatten(structure, values)


def lengths(params):
    """Each weight vector's length over sqrt(fan-in), by path."""
    table = {tree.path_name(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    rows = {name: leaf.reshape(-1, leaf.shape[-1]) for name, leaf in table.items() if leaf.ndim}
    return {name: np.linalg.norm(row, axis=0) / np.sqrt(len(row)) for name, row in rows.items()}


def test_weights_begin_and_are_put_back_on_the_sphere(drawn):
    net, _, params = drawn
    begun = jax.jit(net.init)(jax.random.key(0))
    for name, length in (lengths(begun) | lengths(net.project(params))).items():
        np.testing.assert_allclose(length, 1.0, atol=2e-4, err_msg=name)
    assert np.mean(lengths(params)["out/kernel"]) > 2.0


def test_projecting_changes_neither_gains_nor_the_function(drawn):
    """Only to the epsilon of 1e-4 beside a length; and a second time nothing."""
    net, apply, params = drawn
    x, t, label = normals(3, *SPEC.shape), jnp.linspace(-1.0, 1.0, 3), jnp.arange(3)
    y, projected = apply(params, x, t, label), net.project(params)
    assert np.abs(y).max() > 0.1
    np.testing.assert_allclose(apply(projected, x, t, label), y, atol=2e-3 * np.abs(y).max())
    np.testing.assert_array_equal(projected["gain"], params["gain"])
    twice = net.project(projected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4), twice, projected)
    np.testing.assert_allclose(net.log_variance(projected, t), net.log_variance(params, t), atol=1e-3)


def test_no_label_is_the_zero_vector(drawn):
    """As the published code has it: then nothing of the table is used."""
    _, apply, params = drawn
    x, t, none = normals(2, *SPEC.shape), jnp.array([0.1, 0.2]), jnp.array([1, SPEC.num_classes])
    other = params | {"label": normals(*params["label"].shape, seed=99)}
    y, moved = apply(params, x, t, none), apply(other, x, t, none)
    np.testing.assert_array_equal(y[1], moved[1])
    assert float(jnp.abs(y[0] - moved[0]).max()) > 1e-2


# ------------------------------------------------------------------------------------------ the loss's size

FAMILY = {
    "name": "diffusion",
    "schedule": "edm",
    "prediction": "x0",
    "time_sampling": "log_normal(mean=-1.2,std=1.2)",
    "weighting": "simple",
}
PLAIN = ImageSpec(size=4, channels=1, num_classes=0)


def family(options):
    network = f"edm2(channels=32,multipliers=(1,),blocks=1,attention=(),head_channels=32{options})"
    return families.build({**FAMILY, "network": network}, PLAIN, "float32")


def loss_of(built, pixel):
    """(loss of the denoiser's parameters on 64 images whose pixels are all `pixel`, parameters)."""
    params, extra = built.init(jax.random.key(0))
    batch = {"image": jnp.full((64, *PLAIN.shape), pixel), "index": jnp.arange(64)}
    ctx = Context(
        batch=batch,
        key=rng.stream(0, "train", 0),
        common=rng.stream(0, "train", 0),
        step=jnp.int32(0),
        extra=extra,
        ema={},
        frozen={},
    )
    return lambda own: built.players[0].loss({"denoiser": own}, ctx)[0], params["denoiser"]


def test_the_loss_is_least_where_the_head_says_its_logarithm(monkeypatch):
    """L / exp(v) + v. A network whose output is 0 has L = x0^2 = 0.25 for grey images; the least is 1 + log L."""
    monkeypatch.setattr(edm2.EDM2, "log_variance", staticmethod(lambda params, time: params["v"] * jnp.ones_like(time)))
    loss, params = loss_of(family(""), pixel=0.5)
    at = jax.jit(jax.value_and_grad(lambda v: loss(params | {"v": v})))
    for v in (-1.0, 0.0, 2.0):
        assert float(at(v)[0]) == pytest.approx(0.25 * np.exp(-v) + v, rel=1e-5)
    least, slope = at(np.log(0.25))
    assert float(least) == pytest.approx(1.0 + np.log(0.25), rel=1e-5)
    assert float(slope) == pytest.approx(0.0, abs=1e-5)


def test_the_head_sees_the_time_that_the_network_sees(monkeypatch):
    """Here log(sigma) / 4, of mean -0.3 and spread 0.3: E[L exp(-time) + time] = L exp(0.3 + 0.3^2 / 2) - 0.3."""
    monkeypatch.setattr(edm2.EDM2, "log_variance", staticmethod(lambda params, time: time))
    loss, params = loss_of(family(""), pixel=0.5)
    assert float(jax.jit(loss)(params)) == pytest.approx(0.25 * np.exp(0.345) - 0.3, abs=0.01)


def test_without_the_head_the_loss_is_plain():
    loss, params = loss_of(family(",log_variance=0"), pixel=0.5)
    assert "log_variance" not in params
    assert float(jax.jit(loss)(params)) == pytest.approx(0.25)


def test_weights_stay_on_the_sphere_while_the_family_trains():
    """Adam's steps leave it: without the projection some lengths would be off by 1 % after these three."""
    settings = TrainSettings(
        batch_size=8, learning_rate=0.1, optimizer="adam", learning_rate_schedule="constant_schedule"
    )
    trainer = Trainer(family(",log_variance=8"), settings, seed=0)
    state, step = trainer.init(), jax.jit(trainer.step)
    batch = {"image": 0.5 * jnp.sign(normals(8, *PLAIN.shape)), "index": jnp.arange(8)}
    first = state.params["denoiser"]
    for _ in range(3):
        state, metrics = step(state, batch, {})
        assert np.isfinite(float(metrics["loss"]))
    moved = state.params["denoiser"]
    assert float(jnp.abs(moved["log_variance"] - first["log_variance"]).max()) > 0.05
    assert float(moved["gain"]) != 0.0
    for name, length in lengths(moved).items():
        np.testing.assert_allclose(length, 1.0, atol=2e-4, err_msg=name)


# ------------------------------------------------------------------------------------------ what does not fit


@pytest.mark.parametrize(
    ("text", "size", "says"),
    [
        ("edm2(channels=96,head_channels=64)", 64, "head_channels = 64"),
        ("edm2(head_channels=0)", 64, "head_channels"),
        ("edm2(channels=48,head_channels=16)", 64, "32"),
        ("edm2(multipliers=())", 64, "multipliers"),
        ("edm2(log_variance=-1)", 64, "log_variance"),
        ("edm2(remat='all')", 64, "remat"),
        ("edm2(attention_implementation='flesh')", 64, "attention"),
        ("edm2", 12, "12 pixels"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(text, size, says):
    with pytest.raises(UserError, match=r"^family.network.*" + says):
        networks.build("family.network", text, ImageSpec(size=size, channels=3, num_classes=0))
