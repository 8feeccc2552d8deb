"""Our KL autoencoder against diffusers' `AutoencoderKL` with the same random weights: outputs and gradients."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import tree
from diffusion_jax.networks import tokenizer
from diffusion_jax.types import ImageSpec
from tests.arrays import filled, normals

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is to be fetched
ABSENT = "nothing is compared with diffusers: pip install -e '.[parity]' -c constraints/parity.txt brings it and torch"
torch = pytest.importorskip("torch", reason=ABSENT)
diffusers = pytest.importorskip("diffusers", reason=ABSENT)

SPEC = ImageSpec(size=16, channels=3, num_classes=0)
LATENTS = 4
LEVELS = 2

BLOCK = {"norm_0": "norm1", "conv_0": "conv1", "norm_1": "norm2", "conv_1": "conv2", "skip": "conv_shortcut"}
ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}


def ours(projection):
    text = f"vqgan(channels=128,multipliers=(1,2),blocks=1,projection={projection})"
    codec = tokenizer.build("network", text, SPEC, "float32", LATENTS, 2 * LATENTS)
    return codec, filled(codec.init)


def their_name(path):
    """The parameter of `AutoencoderKL` that ours of this path is."""
    half, place, *rest, leaf = path.split("/")
    leaf = LEAVES[leaf]
    if place == "projection":
        return f"{'quant_conv' if half == 'encoder' else 'post_quant_conv'}.{leaf}"
    if place == "in":
        return f"{half}.conv_in.{leaf}"
    if place == "out":
        return f"{half}.conv_{'norm_out' if rest == ['norm'] else 'out'}.{leaf}"
    if place == "middle":
        if rest[0] == "attention":
            return f"{half}.mid_block.attentions.0.{ATTENTION[rest[1]]}.{leaf}"
        return f"{half}.mid_block.resnets.{rest[0].removeprefix('block_')}.{BLOCK[rest[1]]}.{leaf}"
    kind, level = place.split("_")
    if kind == "stage":
        blocks = f"down_blocks.{level}" if half == "encoder" else f"up_blocks.{LEVELS - 1 - int(level)}"
        return f"{half}.{blocks}.resnets.{rest[0].removeprefix('block_')}.{BLOCK[rest[1]]}.{leaf}"
    if kind == "down":
        return f"{half}.down_blocks.{int(level) - 1}.downsamplers.0.conv.{leaf}"
    return f"{half}.up_blocks.{LEVELS - 1 - int(level)}.upsamplers.0.conv.{leaf}"


def theirs(params, projection):
    """`AutoencoderKL` with our weights, all of its parameters among them."""
    module = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * LEVELS,
        up_block_types=("UpDecoderBlock2D",) * LEVELS,
        block_out_channels=(128, 256),
        layers_per_block=1,
        latent_channels=LATENTS,
        use_quant_conv=projection,
        use_post_quant_conv=projection,
    )
    state = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        axes = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[leaf.ndim]
        state[their_name(tree.path_name(path))] = torch.tensor(np.array(leaf).transpose(axes))
    module.load_state_dict(state)
    return module.eval()


def difference(a, b):
    """The largest, over the largest magnitude."""
    return np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max()


@pytest.mark.parametrize("projection", [True, False])
def test_outputs_and_gradients_are_theirs(projection):
    """Of the encoder, the decoder, and of <direction, output> by their inputs and first kernels."""
    codec, params = ours(projection)
    module = theirs(params, projection)
    at_first = lambda x: x.permute(0, 3, 1, 2)
    halves = {
        "encoder": (codec.encode, lambda x: module.encode(x).latent_dist.parameters, normals(2, 16, 16, 3)),
        "decoder": (codec.decode, lambda z: module.decode(z).sample, normals(2, 8, 8, LATENTS, seed=1)),
    }
    for name, (our, their, x) in halves.items():
        their_x = torch.tensor(np.array(x), requires_grad=True)
        their_y = their(at_first(their_x)).permute(0, 2, 3, 1)
        direction = normals(*their_y.shape, seed=2)
        (torch.tensor(np.array(direction)) * their_y).sum().backward()

        def loss(params, x, our=our, direction=direction):
            y = our(params, x)
            return jnp.sum(direction * y), y

        (of_params, of_x), y = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, x)
        assert difference(y, their_y.detach()) < 1e-5
        assert difference(of_x, their_x.grad) < 1e-5
        kernel = getattr(module, name).conv_in.weight.grad
        assert difference(of_params[name]["in"]["kernel"].transpose(3, 2, 0, 1), kernel) < 1e-5
