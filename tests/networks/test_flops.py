"""Multiply-adds against the papers', closed formulas and XLA's own analysis."""

import functools

import jax
import jax.numpy as jnp
import pytest

from diffusion_jax import networks
from diffusion_jax.networks import attention, flops
from diffusion_jax.networks.presets import PRESETS
from diffusion_jax.types import ImageSpec

PUBLISHED = {
    # Peebles & Xie 2022, Table 4. The last of S/8's two digits is worth 2.8 %; B/4's 5.56 is our 5.57.
    "dit-s/2": 6.06,
    "dit-s/4": 1.41,
    "dit-s/8": 0.36,
    "dit-b/2": 23.01,
    "dit-b/4": 5.56,
    "dit-b/8": 1.42,
    "dit-l/2": 80.71,
    "dit-l/4": 19.70,
    "dit-l/8": 5.01,
    "dit-xl/2": 118.64,
    "dit-xl/4": 29.05,
    "dit-xl/8": 7.39,
}
SIZES = {"s": (384, 12), "b": (768, 12), "l": (1024, 24), "xl": (1152, 28)}
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}


def built(name):
    preset = PRESETS[name]
    return networks.build("network", name, preset.image, channels_out=preset.channels_out), preset.image


@functools.cache
def counted(name):
    return flops.multiply_adds(*built(name))


def of_dit(width, depth, patch, side=32, channels=4, channels_out=8):
    """(matrix products, multiply-adds of modulations and gates) of a DiT with adaLN-Zero, from its sizes.

    `exact` attention takes the sum of its T weights as one more column of v, in each of its heads.
    """
    T, w = (side // patch) ** 2, width
    linear = 3 * w + w + 2 * 4 * w  # qkv, the projection after attention, the MLP: numbers out a token, times w
    block = T * linear * w + 2 * T * T * w + HEADS[w] * T * T + 6 * w * w
    ends = T * patch**2 * (channels + channels_out) * w
    condition = 256 * w + w * w + 2 * w * w
    return depth * block + ends + condition, (2 * depth + 1) * T * w + 2 * depth * T * w


@pytest.mark.parametrize(("name", "gigaflops"), [*PUBLISHED.items(), ("adm-256", 1120.0)])
def test_published_figures(name, gigaflops):
    """The last is of ADM, the U-Net that Peebles & Xie compare theirs with (Figure 2)."""
    assert abs(counted(name) / (1e9 * gigaflops) - 1.0) < 0.005


@pytest.mark.parametrize("name", PUBLISHED)
def test_closed_formula(name):
    """Both ways of counting agree to the last multiply-add."""
    size, patch = name.removeprefix("dit-").split("/")
    assert counted(name) == sum(of_dit(*SIZES[size], int(patch)))


@pytest.mark.parametrize("name", ["dit-s/2", "dit-s/4", "dit-s/8"])
def test_the_compiled_program_takes_as_many(name):
    """Within half a percent of the paper's; XLA's own sum, of other operations too, lies a little above."""
    counts = flops.counts(*built(name))
    assert abs(counts.compiled / (1e9 * PUBLISHED[name]) - 1.0) < 0.005
    assert counts.compiled < counts.cost_analysis < 1.02 * counts.compiled


CONV = {"window_strides": (2, 2), "padding": "SAME", "dimension_numbers": ("NHWC", "HWIO", "NHWC")}
a, w, x = jnp.ones((4, 16)), jnp.ones((16, 16)), jnp.ones((2, 8, 8, 6))
CASES = {
    "product": (lambda a, w: a @ w, (a, w), 4 * 16 * 16),
    "batched": (lambda a: jnp.einsum("bij,bkj->bik", a, a), (jnp.ones((3, 4, 5)),), 3 * 4 * 4 * 5),
    "convolution": (
        lambda x, k: jax.lax.conv_general_dilated(x, k, **CONV),
        (x, jnp.ones((3, 3, 6, 10))),
        2 * 4 * 4 * 10 * 3 * 3 * 6,
    ),
    "groups": (
        lambda x, k: jax.lax.conv_general_dilated(x, k, **CONV, feature_group_count=3),
        (x, jnp.ones((3, 3, 2, 12))),
        2 * 4 * 4 * 12 * 3 * 3 * 2,
    ),
    "transposed": (
        lambda x, k: jax.lax.conv_general_dilated(
            x, k, (1, 1), [(2, 2)] * 2, lhs_dilation=(2, 2), dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        (x, jnp.ones((4, 4, 6, 10))),
        2 * 8 * 8 * 4 * 4 * 6 * 10,  # each pixel in meets each number of the kernel
    ),
    "multiply-add": (lambda a, b, c: a * b + c, (a, 2.0 * a, 3.0 * a), 4 * 16),
    "constants and squares": (lambda a: 2.0 * a + a * a, (a,), 0),
    "scan": (lambda a, w: jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), None), a, None, 5)[0], (a, w), 5 * 4 * 16 * 16),
    "checkpoint": (lambda a, w: jax.checkpoint(lambda a: a @ w)(a), (a, w), 4 * 16 * 16),
    "branches": (
        lambda a, w: jax.lax.cond(a[0, 0] > 0, lambda a: a @ w @ w, lambda a: a @ w, a),
        (a, w),
        2 * 4 * 16 * 16,
    ),
    "own derivative": (lambda a, w: jax.nn.relu(a @ w), (a, w), 4 * 16 * 16),
}


@pytest.mark.parametrize(("function", "arguments", "count"), CASES.values(), ids=CASES)
def test_counts(function, arguments, count):
    counts = flops.counts_of(function, *arguments)
    assert (counts.shapes, counts.compiled) == (count, count)


def test_xlas_own_sum_is_of_the_same_program():
    """Of a plain product it is the same number."""
    assert flops.counts_of(lambda a, w: a @ w, a, w).cost_analysis == pytest.approx(4 * 16 * 16, rel=0.01)


def test_scanned_blocks_count_as_often_as_they_run():
    image = ImageSpec(size=8, channels=3, num_classes=2)
    plain, scanned = (
        networks.build("network", f"dit(depth=3,width=32,heads=2{options})", image)
        for options in ("", ",scan=True,remat='full'")
    )
    count = flops.multiply_adds(plain, image)
    counts = flops.counts(scanned, image)
    assert counts.shapes == count
    assert abs(counts.compiled / count - 1.0) < 0.005


def test_what_shapes_do_not_tell_is_refused():
    forever = lambda a: jax.lax.while_loop(lambda a: a.sum() > 0, lambda a: a @ a, a)
    with pytest.raises(ValueError, match="while: its multiply-adds cannot be told"):
        flops.multiply_adds_of(forever, w)
    q = jax.ShapeDtypeStruct((1, 1024, 6, 64), jnp.float32)
    with pytest.raises(ValueError, match="pallas_call"):
        flops.multiply_adds_of(attention.splash, q, q, q)
