"""Transformers over tokens beside NumPy's statement of what is published: float64, one example after the other."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.arrays import normals
from tests.networks.test_sequence import NETWORKS, network, params, tokens

pytestmark = pytest.mark.usefixtures("quick_compilation")

HEADS, DEPTH = 2, 2
"""Of all networks here; heads are 8 wide."""

erf = np.vectorize(math.erf)


def standardised(x, epsilon):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon)


def layer_norm(x, p, epsilon=1e-6):
    return standardised(x, epsilon) * (1.0 + p["scale"]) + p["shift"]


def rms_norm(x, p):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * (1.0 + p["scale"])


def dense(x, p):
    return x @ p["kernel"] + p.get("bias", 0.0)


def silu(x):
    return x / (1.0 + np.exp(-x))


def gelu_tanh(x):
    return 0.5 * x * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * (x + 0.044715 * x**3)))


def gelu(x):
    return 0.5 * x * (1.0 + erf(x / np.sqrt(2.0)))


def heads(x):
    """[T,width] -> [heads,T,d]."""
    return x.reshape(len(x), HEADS, -1).swapaxes(0, 1)


def attend(q, k, v, scale, mask=None):
    """[heads,T,d] three times -> [T,width]."""
    logits = scale * q @ k.swapaxes(1, 2)
    if mask is not None:
        logits = np.where(mask, logits, -np.inf)
    w = np.exp(logits - logits.max(-1, keepdims=True))
    return (w / w.sum(-1, keepdims=True) @ v).swapaxes(0, 1).reshape(q.shape[1], -1)


@functools.cache
def weights(name):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params(name))


def plain_block(x, p, mlp):
    """Pre-norm, as in timm (MAR)."""
    q, k, v = map(heads, np.split(dense(layer_norm(x, p["attention_norm"]), p["qkv"]), 3, axis=-1))
    x = x + dense(attend(q, k, v, 8**-0.5), p["attention_out"])
    return x + dense(mlp(dense(layer_norm(x, p["mlp_norm"]), p["mlp_in"])), p["mlp_out"])


# ---------------------------------------------------------------------------------------------- GPT


def turned(x, places):
    """Rotary positions in 2-D: complex pairs of [heads,T,8], two frequencies for rows and two for columns."""
    z = x[..., :4] + 1j * x[..., 4:]
    frequencies = np.array([1.0, 0.01])  # 10000^(-i / 2)
    angles = np.array([np.concatenate([row * frequencies, column * frequencies]) for row, column in places])
    z = z * np.exp(1j * angles)
    return np.concatenate([z.real, z.imag], -1)


def gpt(p, row, label, side):
    x = np.concatenate([p["label"][label][None], p["token"][row[:-1]]])
    places = [(0, 0), *((t // side, t % side) for t in range(len(row) - 1))]
    for i in range(DEPTH):
        b = p[f"block_{i}"]
        q, k, v = map(heads, np.split(dense(rms_norm(x, b["attention_norm"]), b["qkv"]), 3, axis=-1))
        y = attend(turned(q, places), turned(k, places), v, 8**-0.5, np.tri(len(x), dtype=bool))
        x = x + dense(y, b["attention_out"])
        gate, up = np.split(dense(rms_norm(x, b["mlp_norm"]), b["mlp_in"]), 2, axis=-1)
        x = x + dense(silu(gate) * up, b["mlp_out"])
    return dense(rms_norm(x, p["out_norm"]), p["out"])


def test_gpt():
    given = np.asarray(tokens("gpt"))
    made = jax.jit(network("gpt").apply)(params("gpt"), jnp.asarray(given), jnp.int32([0, 1, 2]), None)
    expected = [gpt(weights("gpt"), row, label, 3) for row, label in zip(given, range(3), strict=True)]
    np.testing.assert_allclose(made, expected, atol=1e-4)
    assert not any("bias" in path for path in map(str, jax.tree_util.tree_leaves_with_path(params("gpt"))))


# ---------------------------------------------------------------------------------------------- MaskGIT


def maskgit(p, row, label, vocabulary):
    x = p["word"][np.concatenate([[vocabulary + 1 + label], row])] + p["position"]
    x = layer_norm(x, p["in_norm"], 1e-12)
    for i in range(DEPTH):
        b = p[f"block_{i}"]
        q, k, v = map(heads, np.split(dense(x, b["qkv"]), 3, axis=-1))
        x = layer_norm(x + dense(attend(q, k, v, 8**-0.5), b["attention_out"]), b["attention_norm"], 1e-12)
        y = dense(gelu_tanh(dense(x, b["mlp_in"])), b["mlp_out"])
        x = layer_norm(x + y, b["mlp_norm"], 1e-12)
    x = layer_norm(gelu_tanh(dense(x, p["out"])), p["out_norm"], 1e-12)
    return (x @ p["word"].T + p["word_bias"])[1:, :vocabulary]


def test_maskgit():
    given = np.where(np.arange(9) % 2, tokens("maskgit"), 5)  # each second one is masked
    made = jax.jit(network("maskgit").apply)(params("maskgit"), jnp.asarray(given), jnp.int32([0, 1, 2]), None)
    expected = [maskgit(weights("maskgit"), row, label, 5) for row, label in zip(given, range(3), strict=True)]
    np.testing.assert_allclose(made, expected, atol=1e-4)


# ---------------------------------------------------------------------------------------------- VAR


def var(p, vectors, label):
    shown, scale_of = p["label"][label], np.repeat([0, 1, 2], [1, 4, 9])
    x = np.concatenate([(shown + p["first"][0])[None], dense(vectors, p["in"])]) + p["position"] + p["scale"][scale_of]
    mask = scale_of[:, None] >= scale_of
    for i in range(DEPTH):
        b = p[f"block_{i}"]
        of_branch = dense(silu(shown), b["modulation"]).reshape(2, 3, -1)
        shift, scale, gate = of_branch[0]
        q, k, v = map(heads, np.split(dense(standardised(x, 1e-6) * (1.0 + scale) + shift, b["qkv"]), 3, axis=-1))
        q, v = q + b["q_bias"]["bias"].reshape(2, 1, 8), v + b["v_bias"]["bias"].reshape(2, 1, 8)
        q, k = (z / np.linalg.norm(z, axis=-1, keepdims=True) for z in (q, k))
        q = q * np.exp(np.minimum(b["temperature"]["log"], np.log(100.0)))[:, None, None]
        x = x + gate * dense(attend(q, k, v, 1.0, mask), b["attention_out"])
        shift, scale, gate = of_branch[1]
        y = gelu_tanh(dense(standardised(x, 1e-6) * (1.0 + scale) + shift, b["mlp_in"]))
        x = x + gate * dense(y, b["mlp_out"])
    shift, scale = np.split(dense(silu(shown), p["out_modulation"]), 2)
    return dense(standardised(x, 1e-6) * (1.0 + scale) + shift, p["out"])


def test_var():
    vectors = normals(3, 13, 4)
    made = jax.jit(network("var").apply)(params("var"), vectors, jnp.int32([0, 1, 2]), None)
    rows = np.asarray(vectors, np.float64)
    expected = [var(weights("var"), row, label) for row, label in zip(rows, range(3), strict=True)]
    np.testing.assert_allclose(made, expected, atol=1e-4)


# ---------------------------------------------------------------------------------------------- MAR


def mar(p, latents, masked, label):
    """The encoder is given the class tokens and what is known, and nothing in the place of the rest."""
    p = p["places"]
    x = np.concatenate([np.tile(p["label"][label], (3, 1)), dense(latents, p["in"])])
    known = np.concatenate([np.ones(3, bool), ~masked])
    x = layer_norm(x + p["encoder_position"], p["in_norm"])[known]
    for i in range(DEPTH):
        x = plain_block(x, p[f"encoder_{i}"], gelu)
    whole = np.tile(p["mask"], (len(known), 1))
    whole[known] = dense(layer_norm(x, p["encoder_norm"]), p["between"])
    x = whole + p["decoder_position"]
    for i in range(DEPTH):
        x = plain_block(x, p[f"decoder_{i}"], gelu)
    return layer_norm(x, p["decoder_norm"])[3:] + p["out_position"]


def denoise(p, x, time, z):
    """Of one place: x [4], time in [0, 1], z [16]."""
    p = p["denoiser"]
    angles = 1000.0 * time * 10_000.0 ** (-np.arange(128) / 128)
    embedded = dense(silu(dense(np.concatenate([np.cos(angles), np.sin(angles)]), p["time"]["in"])), p["time"]["out"])
    y = silu(embedded + dense(z, p["z"]))
    x = dense(x, p["in"])
    for i in range(2):
        b = p[f"block_{i}"]
        shift, scale, gate = np.split(dense(y, b["modulation"]), 3)
        h = layer_norm(x, b["norm"]) * (1.0 + scale) + shift
        x = x + gate * dense(silu(dense(h, b["mlp_in"])), b["mlp_out"])
    shift, scale = np.split(dense(y, p["out_modulation"]), 2)
    return dense(standardised(x, 1e-6) * (1.0 + scale) + shift, p["out"])


def test_mar():
    latents, x, time = normals(3, 9, 4), normals(3, 9, 4, seed=1), np.linspace(0.0, 1.0, 27).reshape(3, 9)
    masked = np.random.default_rng(0).permuted(np.arange(27).reshape(3, 9) % 9 < 5, axis=1)
    z = jax.jit(network("mar").encode)(params("mar"), latents, jnp.asarray(masked), jnp.int32([0, 1, 2]))
    p, rows = weights("mar"), np.asarray(latents, np.float64)
    np.testing.assert_allclose(z, [mar(p, rows[i], masked[i], i) for i in range(3)], atol=1e-4)
    made = jax.jit(network("mar").denoise)(params("mar"), x, jnp.asarray(time, jnp.float32), z)
    every = [(i, t) for i in range(3) for t in range(9)]
    expected = [denoise(p, np.asarray(x[i, t]), time[i, t], np.asarray(z[i, t])) for i, t in every]
    np.testing.assert_allclose(np.asarray(made).reshape(27, 8), expected, atol=1e-3)


def test_the_sizes_stated_here_are_the_networks():
    for text, _ in NETWORKS.values():
        assert f"depth={DEPTH},heads={HEADS}" in text
