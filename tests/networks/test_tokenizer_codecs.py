"""Codecs and the discriminator of patches: published counts, equations of their blocks, what a logit sees."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import tree
from diffusion_jax.errors import UserError
from diffusion_jax.networks import patchgan, tokenizer
from diffusion_jax.networks.presets import FIRST_STAGES
from diffusion_jax.networks.tokenizer import maskgit, vqgan
from diffusion_jax.tokenizers import autoencoder
from diffusion_jax.types import ImageSpec
from tests.arrays import filled, normals

SPEC = ImageSpec(size=16, channels=3, num_classes=0)
SMALL = {
    "vqgan": "vqgan(channels=8,multipliers=(1,2,1),blocks=1,attention=(8,))",
    "vqgan-features": "vqgan(channels=8,multipliers=(1,2,1),blocks=1,features=5)",
    "vqgan-without-projection": "vqgan(channels=8,multipliers=(1,2,1),blocks=1,projection=False)",
    "maskgit": "maskgit(channels=8,multipliers=(1,2,1),blocks=1)",
}

pytestmark = pytest.mark.usefixtures("quick_compilation")

# ------------------------------------------------------------------------------------------ counts

PUBLISHED = {
    # CompVis/latent-diffusion, AutoencoderKL with the configs of models/first_stage_models
    "kl-f4": 55_312_063,
    "kl-f8": 83_653_863,
    "kl-f16": 69_610_963,
    "kl-f32": 103_880_131,
    # diffusers' AutoencoderKL with the configs of stable-diffusion-3-medium and FLUX.1
    "kl-f8-16": 83_819_683,
    # CompVis/taming-transformers, VQModel: encoder, decoder, two convolutions, codebook
    "vqgan-f16-1024": 72_141_699,
    "vqgan-f16-16384": 76_073_859,
    # google-research/maskgit, VQVAE with the codebook
    "maskgit-vqgan": 54_515_587,
}


@pytest.mark.parametrize(("name", "count"), PUBLISHED.items())
def test_published_counts(name, count):
    built = autoencoder.build(name, name, FIRST_STAGES[name].image, "float32")
    assert tree.count(jax.eval_shape(built.init, jax.random.key(0))[0]) == count


def test_every_preset_is_counted():
    assert set(PUBLISHED) == set(FIRST_STAGES)


def test_published_count_of_the_discriminator():
    """NLayerDiscriminator of 3 layers and 64 channels, which has as many scales and shifts in its batch norms."""
    judge = tokenizer.build_discriminator("d", "patchgan", FIRST_STAGES["kl-f8"].image, "float32")
    params = jax.eval_shape(judge.init, jax.random.key(0))
    assert tree.count(params) == 2_765_633
    assert jax.eval_shape(judge.apply, params, jnp.zeros((2, 256, 256, 3))).shape == (2, 30, 30)


# ------------------------------------------------------------------------------------------ codecs


def build(name, spec=SPEC, latents=4, outputs=8, precision="float32"):
    return tokenizer.build("family.network", SMALL[name], spec, precision, latents, outputs)


@pytest.mark.parametrize("name", SMALL)
def test_there_and_back(name):
    """Sizes; and every image is for itself, whatever stands beside it."""
    codec, x = build(name), normals(3, 16, 16, 3)
    params = filled(codec.init)
    z = normals(3, 4, 4, 4, seed=1)
    for function, given, shape in ((codec.encode, x, (3, 4, 4, 8)), (codec.decode, z, (3, 16, 16, 3))):
        function = jax.jit(function)
        y = function(params, given)
        assert (y.shape, y.dtype) == (shape, jnp.float32)
        among_others = function(params, given.at[::2].multiply(-2.0))
        np.testing.assert_allclose(among_others[1], y[1], rtol=1e-4, atol=1e-5)
        assert not np.allclose(among_others[0], y[0], atol=1e-3)
    assert codec.grid == (4, 4)


@pytest.mark.parametrize("name", ["vqgan", "maskgit"])
def test_bfloat16_is_nearly_float32(name):
    """To a tenth of the largest number, and handed over in float32."""
    exact, rough, x = build(name), build(name, precision="bfloat16"), normals(3, 16, 16, 3)
    params = filled(exact.init)
    round_trip = lambda codec: jax.jit(lambda x: codec.decode(params, codec.encode(params, x)[..., :4]))(x)
    expected, found = round_trip(exact), round_trip(rough)
    assert found.dtype == jnp.float32
    assert 0.0 < np.abs(found - expected).max() < 0.1 * np.abs(expected).max()


def silu(x):
    return x / (1.0 + np.exp(-x))


def group_norm(x, layer):
    """Channels in groups of 4, in float64."""
    groups = np.asarray(x, np.float64).reshape(*x.shape[:-1], -1, 4)
    mean, variance = groups.mean((1, 2, 4), keepdims=True), groups.var((1, 2, 4), keepdims=True)
    return ((groups - mean) / np.sqrt(variance + 1e-6)).reshape(x.shape) * np.asarray(layer["scale"]) + layer["bias"]


def only_centre(conv):
    """A 3x3 kernel with its middle alone, and that 1x1 matrix."""
    kernel = np.zeros_like(conv["kernel"])
    kernel[1, 1] = conv["kernel"][1, 1]
    return conv | {"kernel": kernel}, kernel[1, 1]


@pytest.mark.parametrize("features", [8, 16])
@pytest.mark.parametrize("file", [vqgan, maskgit], ids=["vqgan", "maskgit"])
def test_a_block_is_its_equation(file, features):
    """With convolutions that see one pixel alone. VQGAN's has biases; MaskGIT's has none, and its own way to widen."""
    block, x = file.Block(features, jnp.float32), normals(2, 4, 4, 8)
    params = filled(block.init, x)["params"]
    params["conv_0"], first = only_centre(params["conv_0"])
    params["conv_1"], second = only_centre(params["conv_1"])
    first, second = np.asarray(first), np.asarray(second)
    bias = lambda name: np.asarray(params[name].get("bias", 0.0))
    y = silu(group_norm(x, params["norm_0"])) @ first + bias("conv_0")
    y = silu(group_norm(y, params["norm_1"])) @ second + bias("conv_1")
    wider = lambda a: a @ np.asarray(params["skip"]["kernel"])[0, 0] + bias("skip")
    around = np.asarray(x) if features == 8 else wider(np.asarray(x) if file is vqgan else y)
    np.testing.assert_allclose(block.apply({"params": params}, x), y + around, rtol=1e-3, atol=1e-4)
    assert all(("bias" in params[name]) == (file is vqgan) for name in ("conv_0", "conv_1"))


def test_maskgit_has_no_attention_and_vqgan_has_it_where_it_says():
    """Once at 8 pixels in the encoder, twice in the decoder, and in the middle of both."""
    names = lambda name: [
        tree.path_name(path)
        for path, _ in jax.tree_util.tree_leaves_with_path(jax.eval_shape(build(name).init, jax.random.key(0)))
        if "attention" in tree.path_name(path) and tree.path_name(path).endswith("q/kernel")
    ]
    assert names("maskgit") == []
    assert names("vqgan") == [
        "decoder/middle/attention/q/kernel",
        "decoder/stage_1/attention_0/q/kernel",
        "decoder/stage_1/attention_1/q/kernel",
        "encoder/middle/attention/q/kernel",
        "encoder/stage_1/attention_0/q/kernel",
    ]


# ------------------------------------------------------------------------------------------ patches


class Nothing(nn.Module):
    """In the place of a norm."""

    epsilon: float

    def __call__(self, x):
        return x


@pytest.mark.parametrize(("halvings", "width"), [(1, 16), (2, 34), (3, 70)])
def test_a_logit_sees_a_square(halvings, width, monkeypatch):
    """Isola et al. 2017, appendix 6.1.2: where its slope by the image is not 0, but for what norms tell of the rest."""
    monkeypatch.setattr(patchgan, "GroupNorm", Nothing)
    spec = ImageSpec(size=96, channels=1, num_classes=0)
    judge = tokenizer.build_discriminator("d", f"patchgan(channels=4,halvings={halvings})", spec, "float32")
    params, middle = filled(judge.init), 96 // 2**halvings // 2 - 1
    slope = jax.jit(jax.grad(lambda x: judge.apply(params, x)[0, middle, middle]))(normals(1, 96, 96, 1))
    rows = np.flatnonzero(np.asarray(slope)[0, :, :, 0].any(axis=1))
    assert rows[-1] - rows[0] + 1 == len(rows) == width


# ------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("vqgn", "did you mean 'vqgan'"),
        ("kl-f9", "did you mean 'kl-f"),
        ("vqgan(depth=3)", "no option 'depth'"),
        ("vqgan(blocks=0)", "blocks must be at least 1"),
        ("vqgan(channels=9)", "channels times a multiplier = 9"),
        ("vqgan(attention=(0,))", "attention must be whole numbers"),
        ("vqgan(attention=(5,))", "attention = 5 is none of"),
        ("vqgan(features=-1)", "features must be at least 0"),
        ("vqgan(features=4,projection=False)", "features are those of the projection"),
        ("vqgan(multipliers=(1,1,1,1,1,1))", "halve the image 5 times, and 16 pixels cannot be"),
        ("maskgit(multipliers=(1,1,1,1,1,1))", "halve the image 5 times, and 16 pixels cannot be"),
        ("maskgit(blocks=0)", "blocks must be at least 1"),
    ],
)
def test_impossible_codecs_are_refused(text, says):
    with pytest.raises(UserError, match=f"family.network.*{says}"):
        tokenizer.build("family.network", text, SPEC, "float32", 4, 4)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("patchgn", "did you mean 'patchgan'"),
        ("patchgan(channels=12)", "channels must be a power of two"),
        ("patchgan(halvings=0)", "halvings must be at least 1"),
        ("patchgan", "must be at least 24 pixels wide, and 16 is less"),
    ],
)
def test_impossible_discriminators_are_refused(text, says):
    with pytest.raises(UserError, match=f"family.discriminator.*{says}"):
        tokenizer.build_discriminator("family.discriminator", text, SPEC, "float32")
