"""Multi-scale residual quantisation beside NumPy's statement of it, finite differences, and what it is for.

That sizes are changed as they should be is tested in `test_scales.py`. What all bottlenecks promise, a row of
`test_bottlenecks.py` tests of this one.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusion_jax import rng, tree
from diffusion_jax.errors import UserError
from diffusion_jax.tokenizers import autoencoder, bottlenecks, scales
from diffusion_jax.types import ImageSpec
from tests.arrays import filled, normals

pytestmark = pytest.mark.usefixtures("quick_compilation")

SIDES = (1, 2, 3, 5)
OPTIONS = "codes=7,latents=3,scales=(1,2,3,5),convolutions=2,beta=0.3"
OF_SCALE = (0, 0, 1, 1)
"""The convolution of each scale: their places are 1/4 and 3/4, the scales' 0, 1/3, 2/3 and 1."""


@functools.cache
def build(options=OPTIONS):
    return bottlenecks.build("family.bottleneck", f"residual({options})", 75)


def params(it, seed=1):
    """Codes of which none is far from y, and convolutions that are not small."""
    return filled(lambda key: it.init(key)[0]) | {"codebook": 0.5 * normals(it.codes, it.latents, seed=seed)}


def begun(it):
    return params(it), it.init(jax.random.key(0))[1]


def outputs(count=4, seed=0):
    return normals(count, 5, 5, 3, seed=seed)


def keys(count=4):
    return rng.example_keys(jax.random.key(4), jnp.arange(count))


@functools.cache
def train(it):
    """Compiled."""
    return jax.jit(it.train)


# ---------------------------------------------------------------------------------------------- NumPy's statement


@functools.cache
def matrix(kind, n, side):
    """f64[side,side,n,n] that changes a size, read off the images of one pixel each."""
    pixels = np.eye(n * n, dtype=np.float32).reshape(n * n, n, n, 1)
    return np.asarray(kind(pixels, side), np.float64)[..., 0].reshape(n, n, side, side).transpose(2, 3, 0, 1)


def resized(kind, x, side):
    return np.einsum("ijhw,bhwc->bijc", matrix(kind, x.shape[1], side), x)


def phi(p, k, h):
    """Half of h, half of its 3x3 convolution with zeros around."""
    kernel, bias = (np.asarray(p["phi"][name][OF_SCALE[k]], np.float64) for name in ("kernel", "bias"))
    padded = np.pad(h, ((0, 0), (1, 1), (1, 1), (0, 0)))
    y = sum(padded[:, i : i + 5, j : j + 5] @ kernel[i, j] for i in range(3) for j in range(3))
    return 0.5 * h + 0.5 * (y + bias)


def stages(p, tokens):
    """f^ after each scale, by Algorithm 2."""
    f_hat, found = 0.0, []
    for k, part in enumerate(tokens):
        vectors = np.asarray(p["codebook"], np.float64)[part]
        f_hat = f_hat + phi(p, k, resized(scales.bicubic, vectors, 5))
        found.append(f_hat)
    return found


def algorithm_1(p, f):
    """(tokens of each scale, what they were the nearest to)."""
    tokens, given = [], []
    for side in SIDES:
        left = f - stages(p, tokens)[-1] if tokens else f
        given.append(resized(scales.area, left, side))
        distance = np.square(given[-1][..., None, :] - np.asarray(p["codebook"], np.float64)).sum(-1)
        tokens.append(distance.argmin(-1))
    return tokens, given


def split(rows):
    """[B,L,...] -> one [B,h,h,...] a scale."""
    ends = np.cumsum([side**2 for side in SIDES])
    parts = np.split(np.asarray(rows), ends[:-1], axis=1)
    return [part.reshape(len(part), s, s, *part.shape[2:]) for part, s in zip(parts, SIDES, strict=True)]


def test_tokens_are_those_of_algorithm_1():
    it, f = build(), outputs(20)
    tokens, _ = algorithm_1(params(it), np.asarray(f, np.float64))
    found = jax.jit(it.encode)(params(it), f, None)
    assert found.shape == (20, 39)
    for part, expected in zip(split(found), tokens, strict=True):
        np.testing.assert_array_equal(part, expected)
    assert len(np.unique(found)) == 7


def test_vectors_are_those_of_algorithm_2():
    it = build()
    tokens = np.random.default_rng(0).integers(7, size=(6, 39))
    expected = stages(params(it), split(tokens))
    of_tokens = it.multiscale.bound(params(it))
    for f_hat, one in zip(jax.jit(of_tokens.stages)(jnp.asarray(tokens)), expected, strict=True):
        np.testing.assert_allclose(f_hat, one, atol=1e-5)
    np.testing.assert_allclose(jax.jit(it.decode)(params(it), jnp.asarray(tokens)), expected[-1], atol=1e-5)
    shown = [resized(scales.area, f_hat, side) for f_hat, side in zip(expected, SIDES[1:], strict=False)]
    shown = np.concatenate([rows.reshape(6, -1, 3) for rows in shown], axis=1)
    np.testing.assert_allclose(jax.jit(of_tokens.inputs)(jnp.asarray(tokens)), shown, atol=1e-5)


def test_the_paper_s_sizes():
    """680 tokens for 16x16 places; 4,096 vectors of 32 numbers, four convolutions; which scale has which (Appendix)."""
    it = build("")
    assert it.multiscale.length == 680
    shapes = jax.eval_shape(lambda key: it.init(key)[0], jax.random.key(0))
    assert tree.count(shapes) == 4096 * 32 + 4 * (3 * 3 * 32 * 32 + 32)
    # FoundationVision/VAR, models/quant.py: PhiPartiallyShared with 4 for 10 scales
    assert [it.convolution_of(k) for k in range(10)] == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]


# ---------------------------------------------------------------------------------------------- training


def loss_of(p, y, tokens, stopped, beta=0.3):
    """The mean over scales; sg[.] are those of `stopped` = (y, f^ of each scale)."""
    fixed_y, fixed_stages = stopped
    mean = lambda x: np.square(x).mean((1, 2, 3))
    terms = [mean(fixed_y - f_hat) for f_hat in stages(p, tokens)]
    return sum(terms) / 4 + beta * sum(mean(y - f_hat) for f_hat in fixed_stages) / 4


def test_the_loss_and_its_gradients_are_finite_differences():
    """Of each number of the codebook, the convolutions and y, with the codes as they are; in float64."""
    it, y = build(), outputs(2)
    p, extra = begun(it)
    p64, y64 = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (p, y))
    tokens, _ = algorithm_1(p64, y64)
    stopped = y64, stages(p64, tokens)
    loss = lambda p, y: train(it)(p, extra, y, keys(2), jnp.int32(0)).loss
    np.testing.assert_allclose(loss(p, y), loss_of(p64, y64, tokens, stopped), rtol=1e-5)
    of_p, of_y = jax.jit(jax.grad(lambda p, y: loss(p, y).sum(), argnums=(0, 1)))(p, y)

    def slope(leaf):
        """Around each of the leaf's numbers; the statement reads the leaf anew each time."""
        found, h = np.zeros_like(leaf), 1e-3
        for index in np.ndindex(*leaf.shape):
            ends = []
            for sign in (1.0, -1.0):
                kept, leaf[index] = leaf[index], leaf[index] + sign * h
                ends.append(loss_of(p64, y64, tokens, stopped).sum())
                leaf[index] = kept
            found[index] = (ends[0] - ends[1]) / (2.0 * h)
        return found

    for found, leaf in (
        (of_p["codebook"], p64["codebook"]),
        (of_p["phi"]["bias"], p64["phi"]["bias"]),
        (of_p["phi"]["kernel"][:, 1:, :2], p64["phi"]["kernel"][:, 1:, :2]),
    ):
        np.testing.assert_allclose(found, slope(leaf), rtol=2e-3, atol=2e-5)
    expected = 2.0 * 0.3 * sum(y64 - f_hat for f_hat in stopped[1]) / 4 / 75
    np.testing.assert_allclose(of_y, expected, rtol=1e-4, atol=1e-6)


def test_running_means_are_of_the_residuals_at_all_scales():
    """By NumPy over three steps; convolutions still follow their gradient, and the codebook has none."""
    it = build(OPTIONS + ",codebook='ema'")
    p, extra = begun(it)
    e, N, m = np.asarray(p["codebook"], np.float64), np.zeros(7), np.zeros((7, 3))
    for step in range(3):
        y = outputs(seed=step)
        tokens, given = algorithm_1(p, np.asarray(y, np.float64))
        passed = train(it)(p, extra, y, keys(), jnp.int32(step))
        p, extra = it.settle(p, passed.extra), passed.extra
        flat = np.concatenate([part.ravel() for part in tokens])
        vectors = np.concatenate([part.reshape(-1, 3) for part in given])
        N = 0.99 * N + 0.01 * np.bincount(flat, minlength=7) / len(flat)
        m = 0.99 * m + 0.01 * np.stack([vectors[flat == k].sum(0) for k in range(7)]) / len(flat)
        e = np.where(N[:, None] > 0.0, m / np.maximum(N, 1e-30)[:, None], e)
        np.testing.assert_allclose(p["codebook"], e, rtol=1e-4, atol=1e-5)
    gradient = jax.jit(jax.grad(lambda p: it.train(p, extra, y, keys(), jnp.int32(3)).loss.sum()))(p)
    np.testing.assert_array_equal(gradient["codebook"], np.zeros((7, 3)))
    assert np.abs(gradient["phi"]["kernel"]).min() > 0.0


def test_dead_codes_begin_anew_at_residuals_of_any_scale():
    """Two codes that nothing is near to move onto what the tokens of the batch were the nearest to."""
    it, y = build(OPTIONS + ",revive=0.01"), outputs()
    p, extra = begun(it)
    p["codebook"] = p["codebook"].at[5:].add(100.0)
    extra["usage"] = extra["usage"]._replace(shares=jnp.array([0.2] * 5 + [0.0] * 2), unseen=jnp.float32(0.0))
    extra = train(it)(p, extra, y, keys(), jnp.int32(0)).extra
    after = np.asarray(it.settle(p, extra)["codebook"])
    given = np.concatenate([part.reshape(-1, 3) for part in algorithm_1(p, np.asarray(y, np.float64))[1]])
    np.testing.assert_array_equal(after[:5], p["codebook"][:5])
    np.testing.assert_allclose(np.abs(given[:, None] - after[None, 5:]).max(-1).min(0), 0.0, atol=1e-5)


def fields(count, seed):
    """Smooth y: a mean, a slope and noise, each less than the one before."""
    generator = np.random.default_rng(seed)
    ramp = np.linspace(-1.0, 1.0, 5)
    draw = lambda: generator.normal(size=(count, 1, 1, 3))
    y = draw() + 0.5 * (draw() * ramp[:, None, None] + draw() * ramp[:, None])
    return jnp.asarray(y + 0.2 * generator.normal(size=(count, 5, 5, 3)), jnp.float32)


def test_every_scale_brings_a_learned_quantiser_nearer():
    """Mean square error on held-out y after 300 steps."""
    it = build("codes=32,latents=3,scales=(1,2,3,5)")
    p, extra = it.init(jax.random.key(0))
    optimizer = optax.adam(1e-2)

    @jax.jit
    def learn(p, extra, ys):
        def step(carry, given):
            p, extra, state = carry
            i, y = given

            def loss(p):
                passed = it.train(p, extra, y, keys(32), i)
                return passed.loss.mean(), passed.extra

            (_, extra), gradient = jax.value_and_grad(loss, has_aux=True)(p)
            with jax.numpy_dtype_promotion("standard"):
                update, state = optimizer.update(gradient, state)
            p = optax.apply_updates(p, update)
            return (it.settle(p, extra), extra, state), None

        return jax.lax.scan(step, (p, extra, optimizer.init(p)), (jnp.arange(len(ys)), ys))[0][0]

    p = learn(p, extra, fields(300 * 32, seed=0).reshape(300, 32, 5, 5, 3))
    y = fields(500, seed=1)
    of_scales = jax.jit(lambda y: it.multiscale.bound(p).stages(it.encode(p, y, None)))(y)
    errors = [float(jnp.mean(jnp.square(f_hat - y))) for f_hat in of_scales]
    assert np.var(y) > errors[0] > errors[1] > errors[2] > errors[3]
    assert errors[3] < 0.5 * errors[0]


# ---------------------------------------------------------------------------------------------- in an autoencoder


SPEC = ImageSpec(size=10, channels=1, num_classes=0)
CODEC = "vqgan(channels=8,multipliers=(1,1),blocks=1)"


def test_an_autoencoder_s_tokens_are_those_of_all_scales():
    it = autoencoder.build(CODEC, f"residual({OPTIONS})", SPEC, "float32")
    p = filled(lambda key: it.init(key)[0])
    tokenizer, images = it.tokenizer("autoencoder"), normals(2, 10, 10, 1)
    tokens = jax.jit(tokenizer.encode)(p, images, None)
    assert tokens.shape == (2, *tokenizer.shape) == (2, 39)
    assert (tokenizer.grid, tokenizer.vocabulary, tokenizer.channels) == ((5, 5, 1), 7, 3)
    made, passed = jax.jit(it.train)(p, it.init(jax.random.key(0))[1], images, keys(2), jnp.int32(0))
    np.testing.assert_allclose(jax.jit(tokenizer.decode)(p, tokens), np.clip(made, -1.0, 1.0), atol=1e-5)
    np.testing.assert_allclose(jax.jit(tokenizer.vectors)(p, images, None), passed.z, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("scales=(1,2,4)", "its last scale, 4, must be the grid's side, 5"),
        ("scales=(2,5)", "scales must rise from 1"),
        ("scales=(1,5),convolutions=0", "convolutions must be at least 1"),
        ("scales=(1,5),codes=0", "codes and latents must be at least 1"),
    ],
)
def test_impossible_quantisers_are_refused(options, says):
    with pytest.raises(UserError, match=f"family.bottleneck.*{says}"):
        autoencoder.build(CODEC, f"residual({options})", SPEC, "float32")
