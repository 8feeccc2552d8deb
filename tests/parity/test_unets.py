"""Our U-Nets against diffusers' `UNet2DModel` with the same random weights, none of them 0: outputs and gradients.

What `UNet2DModel` cannot be is told in `benchmarks/twins/unet.py`.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import networks, plugs
from diffusion_jax.networks.presets import PRESETS, expand
from diffusion_jax.types import ImageSpec

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is to be fetched
ABSENT = "nothing is compared with diffusers: pip install -e '.[parity]' -c constraints/parity.txt brings it and torch"
torch = pytest.importorskip("torch", reason=ABSENT)
pytest.importorskip("diffusers", reason=ABSENT)
twins = pytest.importorskip("benchmarks.twins.unet", reason=ABSENT)

LABELS = ImageSpec(size=8, channels=3, num_classes=5)
NETWORKS = {
    "ddpm": "unet(channels=128,multipliers=(1,1,2),blocks=1,attention=(8,2))",
    "adm": "adm(channels=128,multipliers=(1,2),blocks=1,attention=(8,4),head_channels=64,time_scale=1.0)",
    "iddpm-lsun": "adm(channels=128,multipliers=(1,2),blocks=1,heads=1,resblock_updown=False,scale_shift_norm=False)",
}


def options_of(text):
    name, given = expand("network", text)
    return plugs.call("network", networks.BACKBONES[name][0], given, label=name)


def ours(text, spec, channels_out=None):
    """(parameters at random, apply)."""
    net = networks.build("network", text, spec, channels_out=channels_out)
    generator = np.random.default_rng(1)

    def draw(leaf):
        """Weights of a layer with n inputs about 1 / sqrt(n); biases, scales and labels about 0.3."""
        spread = 0.3 if leaf.ndim == 1 else np.prod(leaf.shape[:-1]) ** -0.5
        return jnp.asarray(spread * generator.normal(size=leaf.shape), leaf.dtype)

    return jax.tree.map(draw, jax.eval_shape(net.init, jax.random.key(0))), net.apply


def inputs(spec, batch):
    generator = np.random.default_rng(2)
    x, direction = generator.normal(size=(2, batch, *spec.shape)).astype(np.float32)
    time = np.linspace(0.001, 1.0, batch, dtype=np.float32)
    label = np.arange(batch, dtype=np.int32)[::-1] + spec.num_classes + 1 - batch  # the first is "none"
    return x, direction, time, label if spec.num_classes else None


def twin(options, params, spec, channels_out=None):
    module = twins.torch_unet(options, spec, channels_out)
    twins.load(module, params)
    return module.eval()


def their_output(module, options, x, time, label):
    """Our arguments -> [B,H,W,C], differentiable where x requires it."""
    scale = np.float32(getattr(options, "time_scale", 1000.0))
    label = None if label is None else torch.tensor(label.astype(np.int64))
    return module(x.permute(0, 3, 1, 2), torch.tensor(scale * time), label).sample.permute(0, 2, 3, 1)


def difference(a, b):
    """The largest, over the largest magnitude."""
    return np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max()


@pytest.mark.parametrize("text", NETWORKS.values(), ids=NETWORKS)
def test_outputs_and_gradients_are_theirs(text):
    """Gradients of <direction, output> for the image, and for the first weights on its way and on the label's."""
    options, (params, apply) = options_of(text), ours(text, LABELS)
    x, direction, time, label = inputs(LABELS, 3)

    def loss(params, x):
        y = apply(params, x, time, label)
        return jnp.sum(direction * y), y

    (of_params, of_x), y = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, x)

    module, their_x = twin(options, params, LABELS), torch.tensor(x, requires_grad=True)
    their_y = their_output(module, options, their_x, time, label)
    (torch.tensor(direction) * their_y).sum().backward()

    assert difference(y, their_y.detach()) < 1e-5
    assert difference(of_x, their_x.grad) < 1e-5
    assert difference(of_params["in"]["kernel"].transpose(3, 2, 0, 1), module.conv_in.weight.grad) < 1e-5
    rows = len(of_params["label"])
    assert difference(of_params["label"], module.class_embedding.weight.grad[:rows]) < 1e-5


@pytest.mark.parametrize("name", ["ddpm-cifar10", "iddpm-cifar10"])
def test_the_presets_are_theirs(name):
    preset = PRESETS[name]
    options, (params, apply) = options_of(name), ours(name, preset.image, preset.channels_out)
    x, _, time, label = inputs(preset.image, 2)
    module = twin(options, params, preset.image, preset.channels_out)
    with torch.no_grad():
        theirs = their_output(module, options, torch.tensor(x), time, label)
    assert difference(jax.jit(apply)(params, x, time, label), theirs) < 1e-5


@pytest.mark.parametrize("text", ["unet(channels=64)", "unet(multipliers=(2,2))", "adm-512"])
def test_what_has_no_twin_is_refused(text):
    with pytest.raises(ValueError, match="UNet2DModel needs"):
        twins.torch_unet(options_of(text), LABELS)
