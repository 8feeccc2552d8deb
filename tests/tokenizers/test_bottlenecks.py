"""Bottlenecks against NumPy, finite differences and closed forms; and that a batch is what its parts are together."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import rng
from diffusion_jax.errors import UserError
from diffusion_jax.tokenizers import bottlenecks
from diffusion_jax.tokenizers.bottlenecks.lfq import Expected
from diffusion_jax.variational.gaussian import Gaussian
from tests.arrays import normals

B, SIDE = 4, 2
DIMENSIONS = 48
TEXTS = {
    "kl": "kl(latents=3,weight=0.5)",
    "vq": "vq(codes=6,latents=3)",
    "vq-ema": "vq(codes=6,latents=3,codebook='ema')",
    "vq-revived": "vq(codes=6,latents=3,revive=0.5)",
    "vq-ema-revived": "vq(codes=6,latents=3,codebook='ema',revive=0.5)",
    "residual": "residual(codes=6,latents=3,scales=(1,2),convolutions=1)",
    "residual-ema-revived": "residual(codes=6,latents=3,scales=(1,2),convolutions=1,codebook='ema',revive=0.5)",
    "fsq": "fsq(levels=(4,3,2))",
    "lfq": "lfq(bits=3)",
    "lfq-grouped": "lfq(bits=4,joint=2)",
}


pytestmark = pytest.mark.usefixtures("quick_compilation")


@functools.cache
def build(text):
    return bottlenecks.build("family.bottleneck", TEXTS.get(text, text), DIMENSIONS)


@functools.cache
def train(it):
    """Compiled."""
    return jax.jit(it.train)


def begun(it, seed=0):
    """(Parameters, extra) with a codebook of the size of y."""
    params, extra = it.init(jax.random.key(seed))
    return jax.tree.map(lambda leaf: normals(*leaf.shape, seed=9), params), extra


def outputs(it, count=B, seed=0):
    return normals(count, SIDE, SIDE, it.outputs, seed=seed)


def keys(count=B, first=0):
    return rng.example_keys(jax.random.key(4), first + jnp.arange(count))


# ------------------------------------------------------------------------------------------ all of them


@pytest.mark.parametrize("name", TEXTS)
def test_shapes_and_the_way_back(name):
    """In training the decoder is given what it will be given later; codes lie in the vocabulary."""
    it = build(name)
    (params, extra), y = begun(it), outputs(it)
    passed = train(it)(params, extra, y, keys(), jnp.int32(0))
    given = it.encode(params, y, keys())
    assert passed.z.shape == (B, SIDE, SIDE, it.latents)
    assert passed.loss.shape == (B,)
    np.testing.assert_allclose(passed.z, it.decode(params, given), rtol=1e-6)
    if it.digits:
        assert given.dtype == jnp.int32
        assert given.shape == ((B, 1 + SIDE**2) if name.startswith("residual") else (B, SIDE, SIDE))
        assert 0 <= given.min() <= given.max() < np.prod(it.digits)


@pytest.mark.parametrize("name", TEXTS)
def test_a_batch_is_what_its_parts_are_together(name):
    """Two steps in halves, of examples in another order: the same parameters and the same state."""
    it = build(name)
    params, extra = begun(it)
    ys = [outputs(it, seed=step) for step in range(3)]

    def run(parts):
        state, losses = (params, extra), []
        for step, y in enumerate(ys):
            own, memory = state
            for part in parts:
                passed = train(it)(own, memory, y[part], keys()[part], jnp.int32(step))
                memory = passed.extra
                losses.append(passed.loss.sum())
            state = it.settle(own, memory), memory
        return state, sum(losses)

    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, run([np.array([2, 0]), np.array([3, 1])]), run([np.arange(4)]))


@pytest.mark.parametrize("name", [name for name in TEXTS if name != "kl"])
def test_straight_through_gradients_are_finite_differences_around_the_quantiser(name):
    """L(z) is moved at z itself, by what y would move what is rounded: by as much, or for FSQ by its bounded grid."""
    it = build(name)
    (params, extra), y = begun(it), outputs(it)
    a, b = normals(B, SIDE, SIDE, it.latents, seed=5), normals(B, SIDE, SIDE, it.latents, seed=6)
    loss = lambda z: (np if isinstance(z, np.ndarray) else jnp).sum(a * z**2 + b * z**3)
    found = jax.jit(jax.grad(lambda y: loss(it.train(params, extra, y, keys(), jnp.int32(0)).z)))(y)

    def rounded(y):
        """What the rounding is of."""
        if not name.startswith("fsq"):
            return y
        L = np.array(it.levels)
        half, offset = (L - 1) * 0.999 / 2, 0.5 * (L % 2 == 0)
        return (np.tanh(y + np.tan(offset / half)) * half - offset) / (L // 2)

    y, z, a, b = (np.asarray(x, np.float64) for x in (y, it.decode(params, it.encode(params, y, keys())), a, b))
    expected, h = np.zeros_like(y), 1e-5
    for index in np.ndindex(*y.shape):
        step = np.zeros_like(y)
        step[index] = h
        up, down = (loss(z + rounded(y + sign * step) - rounded(y)) for sign in (1.0, -1.0))
        expected[index] = (up - down) / (2.0 * h)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------------------------------ KL


def test_kl_of_known_gaussians():
    """(m^2 + s^2 - 1 - log s^2) / 2 a number, in nats an image, times the weight over the image's 48 numbers."""
    it, m, s = build("kl"), 0.7, 0.3
    y = jnp.broadcast_to(jnp.array([m, m, m, *[2.0 * np.log(s)] * 3]), (B, SIDE, SIDE, 6))
    nats = SIDE**2 * 3 * 0.5 * (m**2 + s**2 - 1.0 - 2.0 * np.log(s))
    passed = train(it)({}, {}, y, keys(), jnp.int32(0))
    np.testing.assert_allclose(passed.metrics["kl"], nats, rtol=1e-5)
    np.testing.assert_allclose(passed.loss, np.full(B, 0.5 * nats / 48), rtol=1e-5)


def test_kl_latents_are_draws_of_the_posterior():
    it = build("kl")
    y = jnp.broadcast_to(jnp.array([0.5, -1.0, 2.0, *2.0 * np.log([0.1, 0.5, 1.5])], jnp.float32), (5000, 1, 1, 6))
    z = np.asarray(it.encode({}, y, keys(5000)))[:, 0, 0]
    np.testing.assert_allclose(z.mean(0), [0.5, -1.0, 2.0], atol=0.08)
    np.testing.assert_allclose(z.std(0), [0.1, 0.5, 1.5], rtol=0.05)
    np.testing.assert_array_equal(it.encode({}, y[:3], None)[:, 0, 0], np.tile(np.float32([0.5, -1.0, 2.0]), (3, 1)))


def test_kl_log_variances_are_bounded():
    q = build("kl").posterior(jnp.array([0.0] * 3 + [-1e3, 0.0, 1e3]).reshape(1, 1, 1, 6))
    assert isinstance(q, Gaussian)
    np.testing.assert_allclose(2.0 * q.log_std[0, 0, 0], [-30.0, 0.0, 20.0])


# ------------------------------------------------------------------------------------------ VQ


def nearest(y, codebook):
    distances = np.square(np.asarray(y, np.float64)[..., None, :] - np.asarray(codebook, np.float64)).sum(-1)
    return distances.argmin(-1)


def test_vq_takes_the_nearest_code():
    it = build("vq(codes=50,latents=3)")
    (params, _), y = begun(it), outputs(it, 100)
    np.testing.assert_array_equal(it.encode(params, y, None), nearest(y, params["codebook"]))


def test_vq_loss_is_equation_3():
    """Value, and gradients: 2 beta (y - z) / n towards y, and for each code the sum of 2 (e - y) / n."""
    it = build("vq(codes=6,latents=3,beta=0.3)")
    (params, extra), y = begun(it), outputs(it)
    loss = lambda params, y: train(it)(params, extra, y, keys(), jnp.int32(0)).loss
    e = np.asarray(params["codebook"], np.float64)
    tokens = nearest(y, e)
    off, n = np.asarray(y, np.float64) - e[tokens], SIDE**2 * 3
    np.testing.assert_allclose(loss(params, y), 1.3 * np.square(off).mean((1, 2, 3)), rtol=1e-5)
    of_params, of_y = jax.jit(jax.grad(lambda *given: loss(*given).sum(), argnums=(0, 1)))(params, y)
    np.testing.assert_allclose(of_y, 2.0 * 0.3 * off / n, rtol=1e-4, atol=1e-6)
    expected = np.zeros_like(e)
    np.add.at(expected, tokens, -2.0 * off / n)
    np.testing.assert_allclose(of_params["codebook"], expected, rtol=1e-4, atol=1e-6)


def test_vq_codebook_by_running_means():
    """Appendix A.1 by NumPy: N, m and e = m / N over five steps, each with the codebook of the step before."""
    it = build("vq-ema")
    params, extra = begun(it)
    e = np.asarray(params["codebook"], np.float64)
    N, m = np.zeros(6), np.zeros((6, 3))
    for step in range(5):
        y = outputs(it, seed=step)
        passed = train(it)(params, extra, y, keys(), jnp.int32(step))
        params, extra = it.settle(params, passed.extra), passed.extra
        tokens, flat = nearest(y, e).ravel(), np.asarray(y, np.float64).reshape(-1, 3)
        N = 0.99 * N + 0.01 * np.bincount(tokens, minlength=6) / len(tokens)
        m = 0.99 * m + 0.01 * np.stack([flat[tokens == k].sum(0) for k in range(6)]) / len(tokens)
        e = np.where(N[:, None] > 0.0, m / np.maximum(N, 1e-30)[:, None], e)
        np.testing.assert_allclose(params["codebook"], e, rtol=1e-4, atol=1e-5)
    gradient = jax.grad(lambda params: train(it)(params, extra, y, keys(), jnp.int32(5)).loss.sum())(params)
    np.testing.assert_array_equal(gradient["codebook"], np.zeros((6, 3)))


def test_a_code_that_nobody_uses_stays_where_it_is():
    """After thousands of steps m_k has vanished in float32 and N_k not yet: m_k / N_k would be the origin."""
    it = build("vq-ema")
    params, extra = it.init(jax.random.key(0))
    shares = jnp.array([0.5, 0.5, 1e-12, 1e-30, 1e-38, 0.0])
    extra |= {"usage": extra["usage"]._replace(shares=shares), "running": jnp.zeros_like(extra["running"])}
    after = it.settle(params, extra)["codebook"]
    np.testing.assert_array_equal(after[:2], np.zeros((2, 3)))
    np.testing.assert_array_equal(after[2:], params["codebook"][2:])


@pytest.mark.parametrize("name", ["vq-revived", "vq-ema-revived"])
def test_dead_codes_begin_anew_at_outputs_of_the_batch(name):
    """Codes 3, 4 and 5 have no share: they move onto outputs, with the mean share; the others do as without revival."""
    it, plain = build(name), build(name.removesuffix("-revived"))
    params, y, shares = begun(it)[0], outputs(it), jnp.array([0.3, 0.3, 0.4, 0.0, 0.0, 0.0])
    params = {"codebook": params["codebook"].at[3:].add(100.0)}

    def step(it):
        extra = it.init(jax.random.key(0))[1]
        extra["usage"] = extra["usage"]._replace(shares=shares, unseen=jnp.float32(0.0))
        if "running" in extra:
            extra["running"] = shares[:, None] * params["codebook"]
        return train(it)(params, extra, y, keys(), jnp.int32(0)).extra

    extra = step(it)
    after, without = it.settle(params, extra)["codebook"], plain.settle(params, step(plain))["codebook"]
    np.testing.assert_allclose(after[:3], without[:3], rtol=1e-6)
    distance = np.abs(np.asarray(y).reshape(-1, 1, 3) - np.asarray(after)[None, 3:]).max(-1)
    np.testing.assert_allclose(distance.min(0), 0.0, atol=1e-6)
    later = train(it)({"codebook": after}, extra, y, keys(), jnp.int32(1)).extra["usage"].shares
    np.testing.assert_allclose(later[3:], 1.0 / 6.0, rtol=1e-6)


@pytest.mark.parametrize("name", ["vq-revived", "vq-ema-revived"])
def test_no_code_is_dead_before_it_had_time_to_be_used(name):
    """Of codes that no output is near to, log(1/2) / log(0.99) = 68.97: they are dead in the 69th step."""
    it, y = build(name), 0.01 * outputs(build(name))
    params, extra = {"codebook": jnp.zeros((6, 3)).at[1:].add(100.0)}, build(name).init(jax.random.key(0))[1]

    @jax.jit
    def step(extra, step):
        extra = train(it)(params, extra, y, keys(), step).extra
        return extra, it.dead(extra)

    dead = []
    for i in range(69):
        extra, now = step(extra, jnp.int32(i))
        dead.append(np.asarray(now))
    assert not np.any(dead[:68])
    np.testing.assert_array_equal(dead[68], [False] + [True] * 5)


def test_any_output_may_revive_a_code():
    """Of 400 codes each of the batch's 16 outputs revives some: 25 on average, of standard deviation 4.8."""
    it = build("vq(codes=400,latents=3,revive=0.5)")
    y = outputs(it)
    offers, _ = it.offered(y, keys())
    same = (np.asarray(offers)[:, None] == np.asarray(y).reshape(1, -1, 3)).all(-1)
    np.testing.assert_array_equal(same.sum(1), 1)
    assert 5 < same.sum(0).min() <= same.sum(0).max() < 50


# ------------------------------------------------------------------------------------------ FSQ


def test_fsq_of_the_paper_s_example():
    """The notebook beside Mentzer et al. 2023: of levels 3, 5, 4 the numbers 0.25, 0.6, -7 are 0, 0.5, -1, code 10."""
    it = build("fsq(levels=(3,5,4))")
    y = jnp.array([0.25, 0.6, -7.0]).reshape(1, 1, 1, 3)
    assert int(it.encode({}, y, None)[0, 0, 0]) == 10
    np.testing.assert_array_equal(it.decode({}, it.encode({}, y, None))[0, 0, 0], [0.0, 0.5, -1.0])


@pytest.mark.parametrize("levels", [(8, 5, 5, 5), (2, 3), (7,), (8, 6, 5), (256, 2)])
def test_fsq_has_the_product_of_its_levels_in_codes_and_reaches_all(levels):
    """All combinations of values differ; and outputs that give each value in one number give, combined, each code."""
    it, count = build(f"fsq(levels={levels})"), int(np.prod(levels))
    assert int(np.prod(it.digits)) == count
    z = np.asarray(it.decode({}, jnp.arange(count)))
    assert len(np.unique(z, axis=0)) == count
    for i, L in enumerate(levels):
        np.testing.assert_array_equal(np.unique(z[:, i]), np.float32(np.arange(L) - L // 2) / np.float32(L // 2))
    scan = np.linspace(-8.0, 8.0, 4001, dtype=np.float32)
    alike = np.asarray(it.decode({}, it.encode({}, jnp.asarray(np.tile(scan[:, None], len(levels))), None)))
    first = [scan[np.unique(column, return_index=True)[1]] for column in alike.T]
    assert tuple(map(len, first)) == levels
    combined = jnp.asarray([*itertools.product(*first)], jnp.float32)
    np.testing.assert_array_equal(np.sort(it.encode({}, combined, None)), np.arange(count))


def test_fsq_asks_for_nothing():
    it = build("fsq")
    (params, extra), y = begun(it), outputs(it)
    assert params == {}
    np.testing.assert_array_equal(train(it)(params, extra, y, keys(), jnp.int32(0)).loss, np.zeros(B))


# ------------------------------------------------------------------------------------------ LFQ


def corners(bits):
    """All codes, as -1 and 1, code by code."""
    return 2.0 * ((np.arange(2**bits)[:, None] >> np.arange(bits)) & 1) - 1.0


def soft(y, bits, temperature):
    """softmax_c(-|y - c|^2 / tau) by all codes, in jnp."""
    distance = jnp.sum(jnp.square(y[..., None, :] - corners(bits).astype(np.float32)[None, None, None]), axis=-1)
    return jax.nn.softmax(-distance / temperature, axis=-1)


def test_lfq_codes_are_signs():
    it = build("lfq(bits=5)")
    y = outputs(it)
    z = it.decode({}, it.encode({}, y, None))
    np.testing.assert_array_equal(z, np.where(np.asarray(y) > 0.0, 1.0, -1.0))
    np.testing.assert_array_equal(it.decode({}, jnp.arange(32)), corners(5))


def test_lfq_s_soft_codes_are_the_softmax_of_distances():
    it = build("lfq(bits=3,temperature=0.7)")
    y = outputs(it)
    np.testing.assert_allclose(it.soft_codes(4.0 * y / 0.7)[..., 0, :], soft(y, 3, 0.7), rtol=1e-4, atol=1e-6)


def test_lfq_penalises_unsure_bits_and_codes_that_are_not_used_alike():
    """Equation 5 over one batch, and its gradient, where the running mean is the batch's own."""
    it = build("lfq(bits=3,temperature=2.0,weight=0.7,beta=0.3)")
    extra, y = it.init(jax.random.key(0))[1], outputs(it)
    entropy = lambda q: -jnp.sum(jax.scipy.special.xlogy(q, q), axis=-1)

    def equation(y):
        q = soft(y, 3, 2.0)
        commitment = jnp.mean(jnp.square(y - jnp.sign(y)))
        return 0.7 * (jnp.mean(entropy(q)) - entropy(jnp.mean(q, axis=(0, 1, 2)))) + 0.3 * commitment

    own = jnp.mean(soft(y, 3, 2.0), axis=(0, 1, 2))[None]
    zeros = jnp.zeros_like(own)
    extra["expected"] = Expected(step=jnp.int32(0), shares=own, sums=zeros, places=jnp.float32(0.0))
    loss = lambda y: jnp.mean(train(it)({}, extra, y, keys(), jnp.int32(1)).loss)
    np.testing.assert_allclose(loss(y), equation(y), rtol=1e-5)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(y), jax.jit(jax.grad(equation))(y), rtol=1e-3, atol=1e-6)


def test_lfq_s_running_mean():
    """p <- 0.99 p + 0.01 E q, from uniform on, with the mean of the steps before the present one."""
    it = build("lfq(bits=2)")
    extra, p = it.init(jax.random.key(0))[1], np.full(4, 0.25)
    for step in range(4):
        y = outputs(it, seed=step)
        extra = train(it)({}, extra, y, keys(), jnp.int32(step)).extra
        np.testing.assert_allclose(extra["expected"].shares[0], p, rtol=1e-5)
        p = 0.99 * p + 0.01 * np.asarray(soft(y, 2, 1.0)).mean((0, 1, 2))


# ------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("vqq", "did you mean 'vq'"),
        ("vq(code=3)", "did you mean 'codes'"),
        ("vq(dimensions=3)", "no option 'dimensions'"),
        ("kl(dimensions=3)", "no option 'dimensions'"),
        ("kl(latents=0)", "latents must be at least 1"),
        ("kl(weight=-1.0)", "weight must not be negative"),
        ("vq(codes=0)", "codes and latents must be at least 1"),
        ("vq(beta=-0.1)", "beta must not be negative"),
        ("vq(codebook='adam')", "codebook must be one of gradient, ema"),
        ("vq(revive=1.0)", r"revive must lie in \[0, 1\)"),
        ("fsq(levels=())", "levels must be whole numbers from 2 to 256"),
        ("fsq(levels=(8,1))", "levels must be whole numbers from 2 to 256"),
        ("fsq(levels=(256,256,256,2))", "levels must have a product of at most"),
        ("lfq(bits=25)", "bits must be from 1 to 24"),
        ("lfq(bits=9,joint=4)", "joint must be a divisor of bits = 9"),
        ("lfq(temperature=0.0)", "temperature must be positive"),
        ("lfq(weight=-0.1)", "weight and beta must not be negative"),
    ],
)
def test_impossible_bottlenecks_are_refused(text, says):
    with pytest.raises(UserError, match=f"family.bottleneck.*{says}"):
        build(text)
