"""VDM's score network: what it sees beside the image, and what it gives back unchanged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import networks
from diffusion_jax.errors import UserError
from diffusion_jax.networks import vdm
from diffusion_jax.types import ImageSpec
from tests.arrays import normals

SMALL = "vdm(channels=32,depth=1)"


pytestmark = pytest.mark.usefixtures("quick_compilation")


def drawn(text, spec, channels_out=None):
    """(compiled apply, parameters of which none is 0)."""
    net = networks.build("family.network", text, spec, channels_out=channels_out)
    leaves, structure = jax.tree.flatten(jax.eval_shape(net.init, jax.random.key(0)))
    spread = lambda leaf: 0.3 if leaf.ndim == 1 else np.prod(leaf.shape[:-1]) ** -0.5
    values = [np.float32(spread(leaf)) * normals(*leaf.shape, seed=i) for i, leaf in enumerate(leaves)]
    return jax.jit(net.apply), jax.tree.unflatten(structure, values)


def test_fourier_features_count_grey_levels():
    """One period a level of 8-bit images is the same at all of them, half a period changes its sign at each.

    So it is in the paper's code, whose levels k lie at (2 k + 1) / 256 - 1 under frequencies 64 and 128.
    """
    k = np.arange(256)
    ours = vdm.fourier(jnp.float32(k / 127.5 - 1.0)[:, None], vdm.VDMOptions().fourier)
    theirs = np.pi * (2 * k + 1 - 256)
    angles = np.stack([0.5 * theirs, theirs], axis=1)
    np.testing.assert_allclose(ours, np.concatenate([np.sin(angles), np.cos(angles)], axis=1), atol=2e-4)


def test_fourier_features_of_several_channels():
    """Sines, then cosines; in each the channels, and in each of them the frequencies."""
    x = normals(2, 5, 3)
    y = np.asarray(vdm.fourier(x, (0.25, 1.5))).reshape(2, 5, 2, 3, 2)
    for channel in range(3):
        for i, f in enumerate((0.25, 1.5)):
            np.testing.assert_allclose(y[..., 0, channel, i], np.sin(2 * np.pi * f * x[..., channel]), atol=1e-5)
            np.testing.assert_allclose(y[..., 1, channel, i], np.cos(2 * np.pi * f * x[..., channel]), atol=1e-5)


def test_the_input_is_added_to_its_own_channels():
    """A network that learns the variance, too, has three channels more: they begin at 0."""
    spec = ImageSpec(size=4, channels=3, num_classes=0)
    net = networks.build("family.network", SMALL, spec, channels_out=6)
    x = normals(2, *spec.shape)
    y = jax.jit(net.apply)(jax.jit(net.init)(jax.random.key(0)), x, jnp.array([0.5]), None)
    np.testing.assert_array_equal(y, jnp.concatenate([x, jnp.zeros_like(x)], axis=-1))


def test_a_class_is_one_number_beside_the_time():
    """Its row of the first matrix is read where an example has it, and no row where an example has none."""
    spec = ImageSpec(size=4, channels=1, num_classes=3)
    apply, params = drawn(SMALL, spec)
    x, t, label = normals(3, *spec.shape), jnp.array([0.2]), jnp.array([0, 2, 3])
    kernel = params["condition_in"]["kernel"]
    assert kernel.shape == (32 + 3, 4 * 32)
    moved = params | {"condition_in": params["condition_in"] | {"kernel": kernel.at[32:].add(1.0)}}
    y, other = apply(params, x, t, label), apply(moved, x, t, label)
    np.testing.assert_array_equal(other[2], y[2])
    assert float(jnp.abs(other[:2] - y[:2]).reshape(2, -1).max(1).min()) > 1e-2
    only_two = params | {"condition_in": params["condition_in"] | {"kernel": kernel.at[34].add(1.0)}}
    np.testing.assert_array_equal(apply(only_two, x, t, label)[0], y[0])


def test_without_classes_the_published_number_beside_the_time_is_zero():
    """It is counted, for the published network has its row of weights, and it changes nothing."""
    spec = ImageSpec(size=4, channels=1, num_classes=0)
    apply, params = drawn(SMALL, spec)
    kernel = params["condition_in"]["kernel"]
    assert kernel.shape == (32 + 1, 4 * 32)
    moved = params | {"condition_in": params["condition_in"] | {"kernel": kernel.at[32].add(1.0)}}
    x, t = normals(2, *spec.shape), jnp.array([0.2, 0.9])
    np.testing.assert_array_equal(apply(moved, x, t, None), apply(params, x, t, None))


@pytest.mark.parametrize("options", ["attention=True", "fourier=()", "remat='full'"])
def test_options_and_odd_sizes(options):
    """Nothing is halved, so that 5 pixels will do."""
    spec = ImageSpec(size=5, channels=3, num_classes=0)
    net = networks.build("family.network", f"{SMALL[:-1]},{options})", spec)
    params = jax.eval_shape(net.init, jax.random.key(0))
    shape = jax.eval_shape(net.apply, params, jnp.zeros((2, *spec.shape)), jnp.zeros((2,)), None).shape
    assert shape == (2, 5, 5, 3)
    assert params["in"]["kernel"].shape[2] == (3 if options == "fourier=()" else 3 + 2 * 2 * 3)
    with_attention = {name for name in params if name.endswith("attention")}
    assert len(with_attention) == (4 if options == "attention=True" else 1)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("vdm(channels=48)", "32"),
        ("vdm(depth=0)", "depth"),
        ("vdm(fourier=(1.0,-1.0))", "fourier"),
        ("vdm(fourier=('a',))", "fourier"),
        ("vdm(dropout=1.0)", "dropout"),
        ("vdm(remat='all')", "remat"),
        ("vdm(attention_implementation='flesh')", "attention"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(text, says):
    with pytest.raises(UserError, match=r"^family.network.*" + says):
        networks.build("family.network", text, ImageSpec(size=8, channels=3, num_classes=0))
