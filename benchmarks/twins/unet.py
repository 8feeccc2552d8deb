"""diffusers' `UNet2DModel` as the twin of our `unet` and `adm`: the same network in PyTorch, with the same weights.

What `UNet2DModel` cannot be, or not by its options alone:

    sinusoids and condition of another width than the first resolution's    refused (adm-512)
    norms of fewer than 32 groups, ours below 128 channels                  refused
    attentions of different widths with as many heads (adm-128)             heads are set in the finished module
    ADM's label "none", which adds nothing                                  one more row of the class embedding, zeros
    another scale of time than 1000 (edm-imagenet64)                        the caller's: see `torch_unet`
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention

from diffusion_jax.networks.adm import ADMOptions
from diffusion_jax.networks.unet import UNetOptions
from diffusion_jax.types import ImageSpec, Tree


def torch_unet(options: UNetOptions | ADMOptions, spec: ImageSpec, channels_out: int | None = None) -> UNet2DModel:
    """The module in float32, in training mode, with weights of torch's own.

    It is called (x f32[B,C,H,W], time f32[B], label i64[B] or None) and returns an object with `sample`
    f32[B,channels_out,H,W]. Its time is 1000 times ours, or `time_scale` times an ADM's.

    Args:
      options: of our network.
      spec: size, channels and classes of the images.
      channels_out: the image's own where None.

    Raises:
      ValueError: for a network that `UNet2DModel` cannot be.
    """
    widths = [int(options.channels * multiplier) for multiplier in options.multipliers]
    if widths[0] != options.channels or options.channels < 128:
        raise ValueError("UNet2DModel needs multipliers that begin with 1, and at least 128 channels")
    attended = [spec.size >> level in options.attention for level in range(len(widths))]
    module = UNet2DModel(
        sample_size=spec.size,
        in_channels=spec.channels,
        out_channels=channels_out or spec.channels,
        block_out_channels=widths,
        layers_per_block=options.blocks,
        dropout=options.dropout,
        attention_head_dim=None,
        num_class_embeds=spec.num_classes + 1 if spec.num_classes else None,
        **(_adm if isinstance(options, ADMOptions) else _ddpm)(options, attended),
    )
    if isinstance(options, ADMOptions):
        for part in module.modules():
            if isinstance(part, Attention):
                part.heads = options.heads or part.query_dim // options.head_channels
    return module


def _ddpm(options: UNetOptions, attended: list[bool]) -> dict[str, Any]:
    """What makes it DDPM's: frequencies that include the last one, "same" padding, norms with 1e-6."""
    return {
        "down_block_types": ["AttnDownBlock2D" if a else "DownBlock2D" for a in attended],
        "up_block_types": ["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attended)],
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "downsample_padding": 0,
        "norm_eps": 1e-6,
    }


def _adm(options: ADMOptions, attended: list[bool]) -> dict[str, Any]:
    """What makes it ADM's; the attention in the middle has its norm only where asked for."""
    if options.resblock_updown:
        resampling, down, up = "resnet", "ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"
    else:
        resampling, down, up = "conv", "DownBlock2D", "UpBlock2D"
    return {
        "down_block_types": ["AttnDownBlock2D" if a else down for a in attended],
        "up_block_types": ["AttnUpBlock2D" if a else up for a in reversed(attended)],
        "downsample_type": resampling,
        "upsample_type": resampling,
        "resnet_time_scale_shift": "scale_shift" if options.scale_shift_norm else "default",
        "attn_norm_num_groups": 32,
        "norm_eps": 1e-5,
    }


# ------------------------------------------------------------------------------------------ weights

OUTER = {
    "in": "conv_in",
    "out_norm": "conv_norm_out",
    "out": "conv_out",
    "time_in": "time_embedding.linear_1",
    "time_out": "time_embedding.linear_2",
    "middle_0": "mid_block.resnets.0",
    "middle_attention": "mid_block.attentions.0",
    "middle_1": "mid_block.resnets.1",
}
INNER = {
    "norm_0": "norm1",
    "conv_0": "conv1",
    "condition": "time_emb_proj",
    "norm_1": "norm2",
    "conv_1": "conv2",
    "skip": "conv_shortcut",
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "out": "to_out.0",
}
"""Our name -> theirs, of a network's parts and of a part's layers."""


def load(module: UNet2DModel, params: Tree) -> None:
    """Copy our parameters into the module that `torch_unet` made of the same options.

    Raises:
      RuntimeError: where a weight of either has no counterpart, or one of another shape.
    """
    levels = len(module.down_blocks)
    state = {}
    for name, part in params.items():
        if name == "label":
            table = np.asarray(part)
            none = np.zeros((module.class_embedding.num_embeddings - len(table), table.shape[1]), np.float32)
            state["class_embedding.weight"] = torch.tensor(np.concatenate([table, none]))
            continue
        theirs = OUTER.get(name) or _place(name, levels)
        if "kernel" in part and name.startswith(("down", "up")):
            theirs += ".conv"
        state |= {f"{theirs}.{key}": torch.tensor(value) for key, value in _tensors(part).items()}
    module.load_state_dict(state)


def _place(name: str, levels: int) -> str:
    """Their name of `down_2_0`, the block 0 at level 2, of its attention, or of `down_2`, which leads to level 2."""
    way, level, block, attention = re.fullmatch(r"(down|up)_(\d+)(?:_(\d+)(_attention)?)?", name).groups()
    if block is None:
        return f"down_blocks.{int(level) - 1}.downsamplers.0" if way == "down" else _up(level, levels) + ".upsamplers.0"
    stage = f"down_blocks.{level}" if way == "down" else _up(level, levels)
    return f"{stage}.{'attentions' if attention else 'resnets'}.{block}"


def _up(level: str, levels: int) -> str:
    return f"up_blocks.{levels - 1 - int(level)}"


def _tensors(part: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The weights of a layer, or those of a block's layers with their names before them."""
    if "scale" in part:
        return {"weight": np.asarray(part["scale"]), "bias": np.asarray(part["bias"])}
    if "kernel" in part:
        kernel = np.asarray(part["kernel"])
        axes = (3, 2, 0, 1) if kernel.ndim == 4 else (1, 0)
        return {"weight": kernel.transpose(axes), "bias": np.asarray(part["bias"])}
    if "qkv" in part:
        thirds = {key: np.split(np.asarray(value), 3, axis=-1) for key, value in part["qkv"].items()}
        split = {name: {key: third[i] for key, third in thirds.items()} for i, name in enumerate("qkv")}
        part = {"norm": part["norm"], **split, "out": part["out"]}
    return {f"{INNER[name]}.{key}": value for name, layer in part.items() for key, value in _tensors(layer).items()}
