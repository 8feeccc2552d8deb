"""The blocks of DDPM++ and NCSN++ against diffusers', with the same random weights, none of them 0.

diffusers has no whole network of EDM's form: its NCSN++ (`score_sde_ve`) reads the image by skips, not residuals.
"""

import os
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.networks import ddpmpp

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is to be fetched
ABSENT = "nothing is compared with diffusers: pip install -e '.[parity]' -c constraints/parity.txt brings it and torch"
torch = pytest.importorskip("torch", reason=ABSENT)
pytest.importorskip("diffusers", reason=ABSENT)

from diffusers.models.attention_processor import Attention  # noqa: E402
from diffusers.models.resnet import ResnetBlock2D  # noqa: E402

WIDTH, CONDITION = 64, 128


def drawn(layer, *given):
    generator = np.random.default_rng(1)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), *given)["params"]
    scale = lambda p: 0.3 if p.ndim == 1 else np.prod(p.shape[:-1]) ** -0.5
    return jax.tree.map(lambda p: (scale(p) * generator.normal(size=p.shape)).astype(np.float32), shapes)


def load(module, params):
    """Our names -> theirs: kernels are transposed, norms call their scale a weight."""
    for name, own in params.items():
        target = module.get_submodule(name)
        weight = own["scale"] if "scale" in own else np.moveaxis(own["kernel"], (-1, -2), (0, 1))
        target.weight.data.copy_(torch.from_numpy(weight.copy()))
        target.bias.data.copy_(torch.from_numpy(own["bias"].copy()))


def nchw(x):
    return torch.from_numpy(np.moveaxis(x, -1, 1).copy())


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1)], ids=["box", "fir"])
@pytest.mark.parametrize("resize", ["", "halved", "doubled"])
@pytest.mark.parametrize("channels", [64, 96])
def test_residual_blocks(channels, resize, taps):
    generator = np.random.default_rng(0)
    x = generator.normal(size=(2, 8, 8, channels)).astype(np.float32)
    condition = generator.normal(size=(2, CONDITION)).astype(np.float32)
    act = partial(getattr(ddpmpp, resize), taps=taps) if resize else None
    block = ddpmpp.ResidualBlock(WIDTH, 0.0, 0, jnp.float32, act)
    params = drawn(block, x, condition, None)
    theirs = ResnetBlock2D(
        in_channels=channels,
        out_channels=WIDTH,
        temb_channels=CONDITION,
        groups=channels // 4,
        groups_out=WIDTH // 4,
        eps=1e-6,
        skip_time_act=True,
        kernel="fir" if taps != (1, 1) else None,
        output_scale_factor=2**0.5,
        up=resize == "doubled",
        down=resize == "halved",
        use_in_shortcut=True if resize else None,
    )
    names = {
        "norm_0": "norm1",
        "conv_0": "conv1",
        "condition": "time_emb_proj",
        "norm_1": "norm2",
        "conv_1": "conv2",
        "skip": "conv_shortcut",
    }
    load(theirs, {names[name]: own for name, own in params.items()})
    with torch.no_grad():
        expected = np.moveaxis(theirs(nchw(x), torch.from_numpy(condition)).numpy(), 1, -1)
    y = jax.jit(block.apply)({"params": params}, x, condition, None)
    assert np.linalg.norm(y - expected) < 1e-5 * np.linalg.norm(expected)


def test_attention():
    x = np.random.default_rng(0).normal(size=(2, 8, 8, WIDTH)).astype(np.float32)
    layer = ddpmpp.Attention("auto", jnp.float32)
    params = drawn(layer, x)
    theirs = Attention(
        WIDTH,
        heads=1,
        dim_head=WIDTH,
        norm_num_groups=WIDTH // 4,
        eps=1e-6,
        bias=True,
        residual_connection=True,
        rescale_output_factor=2**0.5,
    )
    kernels, biases = (np.split(params["qkv"][name], 3, axis=-1) for name in ("kernel", "bias"))
    own = {f"to_{name}": {"kernel": kernels[i], "bias": biases[i]} for i, name in enumerate("qkv")}
    load(theirs, {**own, "group_norm": params["norm"], "to_out.0": params["out"]})
    with torch.no_grad():
        expected = np.moveaxis(theirs(nchw(x)).numpy(), 1, -1)
    y = jax.jit(layer.apply)({"params": params}, x)
    assert np.linalg.norm(y - expected) < 1e-5 * np.linalg.norm(expected)
