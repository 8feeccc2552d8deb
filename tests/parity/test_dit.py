"""Our DiT against diffusers' `DiTTransformer2DModel`, and the lean twin, with the same random weights, none of them 0.

What differs between them before that is told in `benchmarks/twins/dit.py`.
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
twins = pytest.importorskip("benchmarks.twins.dit", reason=ABSENT)

LABELS = ImageSpec(size=8, channels=4, num_classes=5)
TINY = "dit(patch=2,width=48,depth=3,heads=3)"
MAKERS = {"diffusers": twins.torch_dit, "lean": twins.lean_dit}


def options_of(text):
    name, given = expand("network", text)
    return plugs.call("network", networks.BACKBONES[name][0], given, label=name)


def ours(text, spec, channels_out):
    """(parameters at random, apply)."""
    net = networks.build("network", text, spec, channels_out=channels_out)
    generator = np.random.default_rng(1)

    def draw(leaf):
        """Weights of a layer with n inputs about 1 / sqrt(n); biases and labels about 0.3."""
        spread = 0.3 if leaf.ndim == 1 else leaf.shape[0] ** -0.5
        return jnp.asarray(spread * generator.normal(size=leaf.shape), leaf.dtype)

    return jax.tree.map(draw, jax.eval_shape(net.init, jax.random.key(0))), net.apply


def inputs(spec, batch, channels_out):
    generator = np.random.default_rng(2)
    x = generator.normal(size=(batch, *spec.shape)).astype(np.float32)
    direction = generator.normal(size=(batch, spec.size, spec.size, channels_out)).astype(np.float32)
    time = np.linspace(0.001, 1.0, batch, dtype=np.float32)
    label = np.arange(batch, dtype=np.int32)[::-1] + spec.num_classes + 1 - batch  # the first is "none"
    return x, direction, time, label if spec.num_classes else None


def their_output(module, x, time, label):
    """Our arguments -> [B,H,W,C], differentiable where x requires it."""
    label = None if label is None else torch.tensor(label.astype(np.int64))
    y = module(x.permute(0, 3, 1, 2), torch.tensor(np.float32(1000.0) * time), label)
    return getattr(y, "sample", y).permute(0, 2, 3, 1)


def difference(a, b):
    """The largest, over the largest magnitude."""
    return np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max()


@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
def test_outputs_and_gradients_are_theirs(maker):
    """Gradients of <direction, output> for the image, and for the weights on both ends of the way."""
    options, (params, apply) = options_of(TINY), ours(TINY, LABELS, 8)
    x, direction, time, label = inputs(LABELS, 3, 8)

    def loss(params, x):
        y = apply(params, x, time, label)
        return jnp.sum(direction * y), y

    (of_params, of_x), y = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, x)

    module = maker(options, LABELS, 8).eval()
    twins.load(module, params)
    their_x = torch.tensor(x, requires_grad=True)
    their_y = their_output(module, their_x, time, label)
    (torch.tensor(direction) * their_y).sum().backward()

    assert difference(y, their_y.detach()) < 1e-5
    assert difference(of_x, their_x.grad) < 1e-5
    lean = isinstance(module, twins.LeanDiT)
    patch_in, patch_out = (module.patch_in, module.patch_out) if lean else (module.pos_embed.proj, module.proj_out_2)
    assert difference(of_params["patch_out"]["kernel"].T, patch_out.weight.grad) < 1e-5
    kernel = of_params["patch_in"]["kernel"].reshape(2, 2, 4, -1).transpose(3, 2, 0, 1)
    assert difference(kernel, patch_in.weight.grad) < 1e-5
    tables = [module.label] if lean else [b.norm1.emb.class_embedder.embedding_table for b in module.transformer_blocks]
    assert difference(of_params["label"], sum(table.weight.grad for table in tables)) < 1e-5


@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
def test_the_preset_is_theirs(maker):
    preset = PRESETS["dit-s/2"]
    params, apply = ours("dit-s/2", preset.image, preset.channels_out)
    x, _, time, label = inputs(preset.image, 2, preset.channels_out)
    module = maker(options_of("dit-s/2"), preset.image, preset.channels_out).eval()
    twins.load(module, params)
    with torch.no_grad():
        theirs = their_output(module, torch.tensor(x), time, label)
    assert difference(jax.jit(apply)(params, x, time, label), theirs) < 1e-5


def test_without_labels_the_lean_one_is_ours():
    spec = ImageSpec(size=8, channels=4, num_classes=0)
    params, apply = ours(TINY, spec, 4)
    x, _, time, _ = inputs(spec, 2, 4)
    module = twins.lean_dit(options_of(TINY), spec).eval()
    twins.load(module, params)
    with torch.no_grad():
        theirs = their_output(module, torch.tensor(x), time, None)
    assert difference(jax.jit(apply)(params, x, time, None), theirs) < 1e-5
    with pytest.raises(ValueError, match="needs classes"):
        twins.torch_dit(options_of(TINY), spec)


@pytest.mark.parametrize("options", ["rope=True", "conditioning='adaln'", "norm='rms'", "mlp_ratio=2.0", "scan=True"])
def test_what_has_no_twin_is_refused(options):
    for maker in MAKERS.values():
        with pytest.raises(ValueError, match="the twins of a DiT need " + options.split("=")[0]):
            maker(options_of(f"dit({options})"), LABELS)
