"""Perceptual distances: LPIPS beside a plain NumPy statement, its file, and the classifier's maps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.signal import correlate2d

from diffusion_jax.errors import UserError
from diffusion_jax.networks import build_classifier, perceptual
from diffusion_jax.tokenizers.perceptual import LPIPS, expected
from diffusion_jax.types import ImageSpec
from tests.arrays import filled, normals

pytestmark = pytest.mark.usefixtures("quick_compilation")

SPEC = ImageSpec(size=16, channels=3, num_classes=0)


NARROW = ((2, 2), (3, 3), (4, 4, 4), (5, 5, 5), (6, 6, 6))


@pytest.fixture
def narrow(monkeypatch):
    """A VGG16 of few channels."""
    monkeypatch.setattr(perceptual, "VGG16", NARROW)


def arrays():
    """In the published names, shapes and order of axes; random, of such a size that maps neither vanish nor explode."""
    generator, made = np.random.default_rng(0), {}
    for name, shape in expected().items():
        spread = (2.0 / np.prod(shape[1:])) ** 0.5 if len(shape) > 1 else 0.1
        made[name] = (spread * generator.normal(size=shape)).astype(np.float32)
    return {name: np.abs(array) if name.startswith("lin") else array for name, array in made.items()}


def test_the_arrays_are_those_of_the_published_files():
    """torchvision's vgg16 has 13 convolutions, 14,714,688 numbers; the five layers of LPIPS weigh 1,472 channels."""
    shapes = expected()
    vgg = {name: shape for name, shape in shapes.items() if name.startswith("features")}
    assert [int(name.split(".")[1]) for name in vgg if name.endswith("bias")] == [
        0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28,
    ]  # fmt: skip
    assert sum(np.prod(shape) for shape in vgg.values()) == 14_714_688
    assert sum(np.prod(shape) for name, shape in shapes.items() if name.startswith("lin")) == 1472


def lpips_by_numpy(x, y):
    """Zhang et al. 2018, eq. 1, of two images [C,H,W] in [-1,1], layer after layer."""
    layers = ["C", "C", "M", "C", "C", "M", "C", "C", "C", "M", "C", "C", "C", "M", "C", "C", "C"]

    def maps(x):
        x = np.repeat(x, 3, axis=0) if len(x) == 1 else x
        x = (x - np.array([-0.030, -0.088, -0.188])[:, None, None]) / np.array([0.458, 0.448, 0.450])[:, None, None]
        found, number = [], 0
        for i, kind in enumerate(layers):
            if kind == "M":
                x = x.reshape(len(x), x.shape[1] // 2, 2, x.shape[2] // 2, 2).max((2, 4))
                number += 1
                continue
            weight, bias = (np.float64(arrays()[f"features.{number}.{name}"]) for name in ("weight", "bias"))
            x = np.stack([sum(correlate2d(x[c], k[c], "same") for c in range(len(x))) for k in weight])
            x = np.maximum(x + bias[:, None, None], 0.0)
            number += 2
            if i + 1 == len(layers) or layers[i + 1] == "M":
                found.append(x)
        return found

    total = 0.0
    for i, (a, b) in enumerate(zip(maps(x), maps(y), strict=True)):
        unit = lambda m: m / (np.sqrt(np.sum(m**2, axis=0)) + 1e-10)
        w = arrays()[f"lin{i}.model.1.weight"].reshape(-1)
        total += np.mean(np.tensordot(w, (unit(a) - unit(b)) ** 2, 1))
    return total


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.usefixtures("narrow")
def test_lpips_is_equation_1(tmp_path, channels):
    np.savez(tmp_path / "lpips.npz", **arrays(), other=np.zeros(3))
    it = LPIPS(spec=SPEC, path=str(tmp_path / "lpips.npz"))
    x, y = (jnp.tanh(normals(2, 16, 16, channels, seed=seed)) for seed in (0, 1))
    found = np.asarray(jax.jit(it)(it.load(None), x, y), np.float64)
    both = [np.asarray(images, np.float64).transpose(0, 3, 1, 2) for images in (x, y)]
    np.testing.assert_allclose(found, [lpips_by_numpy(*pair) for pair in zip(*both, strict=True)], rtol=1e-4)


def small(widths=(2, 3)):
    """Two blocks of one convolution each."""
    generator = np.random.default_rng(0)
    kernels = [generator.normal(size=(3, 3, a, b)) for a, b in zip((3, *widths), widths, strict=False)]
    return [[{"kernel": jnp.asarray(k, jnp.float32), "bias": jnp.zeros(k.shape[-1])}] for k in kernels]


def test_the_distance_by_hand():
    """Of maps of one place: directions (3, 4) / 5 and (1, 0) differ by (-0.4, 0.8), weighed 0.5 and 2."""
    maps, others = [jnp.array([3.0, 4.0]).reshape(1, 1, 1, 2)], [jnp.array([7.0, 0.0]).reshape(1, 1, 1, 2)]
    found = perceptual.distance(maps, others, [jnp.array([0.5, 2.0])])
    np.testing.assert_allclose(found, [0.5 * 0.16 + 2.0 * 0.64], rtol=1e-6)
    wide = [jnp.concatenate([m, m], axis=2) for m in (maps[0], others[0])]
    np.testing.assert_allclose(perceptual.distance(wide[:1], wide[1:], [jnp.array([0.5, 2.0])]), found, rtol=1e-6)


def test_where_no_channel_answers_there_is_no_gradient():
    """And no NaN, which the derivative of |y| at 0 would be."""
    gradient = jax.grad(lambda y: perceptual.distance([y], [jnp.ones((1, 1, 1, 3))], [jnp.ones(3)])[0])
    np.testing.assert_array_equal(gradient(jnp.zeros((1, 1, 1, 3))), np.zeros((1, 1, 1, 3)))


def test_vgg_s_pooling_halves_and_grey_is_three_equal_channels():
    x = jnp.tanh(normals(2, 8, 8, 1))
    grey = perceptual.vgg16(small(), x)
    assert [m.shape for m in grey] == [(2, 8, 8, 2), (2, 4, 4, 3)]
    for a, b in zip(grey, perceptual.vgg16(small(), jnp.repeat(x, 3, axis=-1)), strict=True):
        np.testing.assert_array_equal(a, b)
        assert np.all(a >= 0.0)
        assert np.any(a > 0.0)


@pytest.mark.parametrize(("size", "sides"), [(8, [8, 4]), (32, [16, 8, 4])])
def test_the_classifier_s_maps_lead_to_its_features(size, sides):
    """From fine to coarse; the last one, through the dense layers by hand, gives the logits."""
    spec = ImageSpec(size=size, channels=1, num_classes=3)
    it = build_classifier(spec, 64)
    params, x = filled(it.init), jnp.tanh(normals(2, size, size, 1))
    maps = perceptual.classifier(params, x)
    assert [m.shape[1] for m in maps] == sides
    hidden = np.maximum(
        np.asarray(maps[-1]).reshape(2, -1) @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"], 0
    )
    logits = hidden @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"]
    np.testing.assert_allclose(it.apply(params, x)[0], logits, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("narrow")
def test_without_weights_all_channels_weigh_alike(tmp_path):
    """VGG's file alone is as both with weights of 1; a part of them is refused."""
    vgg = {name: array for name, array in arrays().items() if not name.startswith("lin")}
    np.savez(tmp_path / "vgg.npz", **vgg)
    np.savez(tmp_path / "ones.npz", **{name: vgg.get(name, np.ones_like(array)) for name, array in arrays().items()})
    found, expected = (LPIPS(spec=SPEC, path=str(tmp_path / name)).load(None) for name in ("vgg.npz", "ones.npz"))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def broken(kind):
    if kind == "part":
        return {name: array for name, array in arrays().items() if name != "lin3.model.1.weight"}
    if kind == "missing":
        return {name: array for name, array in arrays().items() if name != "features.5.bias"}
    if kind == "shape":
        return arrays() | {"lin2.model.1.weight": np.zeros((1, 5, 1, 1), np.float32)}
    return arrays() | {"features.0.bias": np.zeros(2, np.int32)}


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("nothing", "must be an .npz file that can be read"),
        ("text", "must be an .npz file that can be read"),
        ("array", "must be an .npz file that can be read"),
        ("missing", r"must hold 'features.5.bias', numbers of shape \(3,\)"),
        ("shape", r"must hold 'lin2.model.1.weight', numbers of shape \(1, 4, 1, 1\)"),
        ("part", r"must hold 'lin3.model.1.weight'"),
        ("dtype", "must hold 'features.0.bias'"),
    ],
)
@pytest.mark.usefixtures("narrow")
def test_another_file_is_refused_in_a_sentence(tmp_path, kind, says):
    file = tmp_path / "file.npz"
    if kind == "text":
        file.write_text("weights")
    elif kind == "array":
        with file.open("wb") as stream:
            np.save(stream, np.zeros(3))
    elif kind != "nothing":
        np.savez(file, **broken(kind))
    with pytest.raises(UserError, match=f"family.perceptual: option 'path' of lpips = .*file.npz.*{says}"):
        LPIPS(spec=SPEC, path=str(file)).load(None)
