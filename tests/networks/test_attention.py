"""Attention: every implementation that can run here against its formula, derivatives both ways, and lowering."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.networks import attention
from diffusion_jax.networks.attention import IMPLEMENTATIONS

HERE = {
    "exact": attention.exact,
    "xla": attention.xla,
    "auto": attention.attention,
    "splash": partial(attention.splash, interpret=True),
}


@pytest.fixture(params=HERE)
def implementation(request):
    return jax.jit(HERE[request.param])


def inputs(shape=(2, 128, 3, 16), keys=128, dtype=jnp.float32):
    """Queries, keys and values whose logits spread over +-6, far from a uniform softmax."""
    generator = np.random.default_rng(0)
    B, T, heads, d = shape
    draw = lambda n, size: jnp.asarray(size * generator.normal(size=(B, n, heads, d)), dtype)
    return draw(T, 2.0), draw(keys, 1.0), draw(keys, 1.0)


def softmax_attention(q, k, v):
    """Vaswani et al. 2017, eq. 1, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    logits = np.einsum("bthd,bshd->bhts", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("bhts,bshd->bthd", weights / weights.sum(-1, keepdims=True), v)


def difference_quotient(given, along):
    """Of the formula at `given`, by central differences in float64."""
    moved = lambda h: softmax_attention(
        *(np.asarray(x, np.float64) + h * np.asarray(d, np.float64) for x, d in zip(given, along, strict=True))
    )
    return (moved(1e-5) - moved(-1e-5)) / 2e-5


@pytest.mark.parametrize("keys", [128, 256])
def test_formula(implementation, keys):
    given = inputs(keys=keys)
    np.testing.assert_allclose(implementation(*given), softmax_attention(*given), atol=2e-6)


@pytest.mark.parametrize("name", HERE)
def test_statistics_are_float32_where_arrays_are_bfloat16(name):
    """Against the exact value of the rounded inputs. Weights and result may be rounded to 8 bits, the logits may not:
    of up to 100 as here, they would be off by 0.2, and the result by 0.1. Not jitted: XLA may leave roundings out."""
    q, k, v = (x.astype(jnp.bfloat16) for x in inputs())
    q = q * jnp.bfloat16(8.0)
    y = HERE[name](q, k, v)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, np.float32), softmax_attention(q, k, v), atol=0.02)


def test_large_logits_do_not_overflow(implementation):
    q, k, v = inputs()
    y = implementation(100.0 * q, k, v)
    np.testing.assert_allclose(y, softmax_attention(100.0 * q, k, v), atol=1e-3)


@pytest.mark.parametrize("name", ["exact", "xla", "auto"])
def test_forward_derivative_is_the_difference_quotient(name):
    """On a CPU, "auto" is among those that forward mode accepts."""
    given = inputs((1, 5, 2, 4), keys=5)
    along = given[::-1]
    _, change = jax.jvp(HERE[name], given, along)
    np.testing.assert_allclose(change, difference_quotient(given, along), atol=1e-5)


def test_backward_derivative_is_the_transpose_of_the_forward_one(implementation):
    """<u, J d> = <J^T u, d>."""
    given, along = inputs(), inputs()[::-1]
    u = jax.random.normal(jax.random.key(0), given[0].shape)
    gradients = jax.jit(jax.grad(lambda given: jnp.sum(u * implementation(*given))))(given)
    backward = sum(np.vdot(np.asarray(g, np.float64), d) for g, d in zip(gradients, along, strict=True))
    np.testing.assert_allclose(backward, np.vdot(u, difference_quotient(given, along)), rtol=1e-4)


def test_gradients_in_bfloat16(implementation):
    """Within a few roundings to 8 bits of those of float32 on the same, rounded inputs."""
    rounded = tuple(x.astype(jnp.bfloat16) for x in inputs())
    u = jax.random.normal(jax.random.key(0), rounded[0].shape)

    def gradients(*given):
        return jax.grad(lambda given: jnp.sum(u * implementation(*given).astype(jnp.float32)))(given)

    with jax.numpy_dtype_promotion("standard"):  # jax's own attention mixes the two
        ours = gradients(*rounded)
    exact = gradients(*(x.astype(jnp.float32) for x in rounded))
    for a, b in zip(ours, exact, strict=True):
        assert a.dtype == jnp.bfloat16
        assert np.linalg.norm(np.asarray(a, np.float32) - b) < 0.02 * np.linalg.norm(b)


# ------------------------------------------------------------------------------------------ other platforms


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("d", [64, 72])
def test_splash_lowers_for_tpus_with_its_gradient(dtype, d):
    """Head width 72 is that of DiT-XL; 64x64 tokens."""
    shape = jax.ShapeDtypeStruct((2, 4096, 3, d), dtype)
    loss = lambda q, k, v: jnp.sum(attention.splash(q, k, v).astype(jnp.float32))
    program = jax.export.export(jax.jit(jax.grad(loss, (0, 1, 2))), platforms=["tpu"])(shape, shape, shape)
    assert program.mlir_module().count("tpu_custom_call") >= 2
    assert "4096x4096" not in program.mlir_module()


@pytest.mark.parametrize(
    ("platform", "tokens", "d", "dtype", "expected"),
    [
        ("cpu", 4096, 64, jnp.bfloat16, "exact"),
        ("gpu", 256, 72, jnp.bfloat16, "cudnn"),
        ("gpu", 257, 64, jnp.bfloat16, "cudnn"),
        ("gpu", 256, 64, jnp.float32, "xla"),
        ("gpu", 256, 512, jnp.bfloat16, "xla"),
        ("gpu", 256, 36, jnp.bfloat16, "xla"),
        ("tpu", 1024, 64, jnp.bfloat16, "splash"),
        ("tpu", 4096, 72, jnp.float32, "splash"),
        ("tpu", 256, 64, jnp.bfloat16, "xla"),
        ("tpu", 1025, 64, jnp.bfloat16, "xla"),
    ],
)
def test_choice(platform, tokens, d, dtype, expected):
    """cuDNN takes half precision, heads of up to 128 in steps of 8; splash whole blocks of 128 tokens."""
    q = jax.ShapeDtypeStruct((2, tokens, 3, d), dtype)
    assert attention.choose(platform, q, q) == expected


def test_cudnn_has_no_gradient_under_a_mask_with_odd_sides():
    """As jax says: cuDNN's backward pass with a bias takes even lengths alone."""
    of = lambda tokens: jax.ShapeDtypeStruct((2, tokens, 3, 64), jnp.bfloat16)
    assert attention.choose("gpu", of(256), of(256), masked=True) == "cudnn"
    assert attention.choose("gpu", of(85), of(85), masked=True) == "xla"
    assert attention.choose("gpu", of(256), of(85), masked=True) == "xla"


def test_unknown_implementation_is_refused():
    for name in ("auto", *IMPLEMENTATIONS):
        attention.check(name)
    with pytest.raises(ValueError, match="attention must be one of auto, exact"):
        attention.check("flash")
