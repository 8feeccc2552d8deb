"""The twins of our `dit` in PyTorch: diffusers' `DiTTransformer2DModel`, and the published network written lean.

Each of diffusers' blocks embeds time and label anew, with weights of its own: with one set of weights in all blocks it
is the published DiT. `LeanDiT` embeds them once, as the published code does, and is what a benchmark should race.

What `DiTTransformer2DModel` cannot be, or not by its options alone:

    networks without labels, and all but adaLN-Zero with tanh-GELU and layer norms    refused
    frequencies of the time that leave out 1/10,000, as published                     set in the finished module
    labels that are never hidden in training                                          set in the finished module
"""

import math
import re
from collections.abc import Iterator, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

from diffusion_jax.networks.dit import DiTOptions, positions_2d
from diffusion_jax.types import ImageSpec, Tree

Weights = dict[str, np.ndarray]
PUBLISHED = {
    "conditioning": "adaln_zero",
    "shared_modulation": False,
    "rope": False,
    "registers": 0,
    "mlp": "gelu",
    "norm": "layer",
    "epsilon": 1e-6,
    "qkv_bias": True,
    "qk_norm": False,
    "scan": False,
}
"""What both twins are; sizes are free."""


def torch_dit(options: DiTOptions, spec: ImageSpec, channels_out: int | None = None) -> DiTTransformer2DModel:
    """diffusers' module in float32, in training mode, with weights of torch's own.

    It is called (x f32[B,C,H,W], time f32[B], label i64[B]) and returns an object with `sample`
    f32[B,channels_out,H,W]. Its time is 1000 times ours.

    Args:
      options: of our network.
      spec: size, channels and classes of the images.
      channels_out: the image's own where None.

    Raises:
      ValueError: for a network that it cannot be.
    """
    _check(options)
    if not spec.num_classes:
        raise ValueError("DiTTransformer2DModel needs classes")
    module = DiTTransformer2DModel(
        num_attention_heads=options.heads,
        attention_head_dim=options.width // options.heads,
        in_channels=spec.channels,
        out_channels=channels_out or spec.channels,
        num_layers=options.depth,
        dropout=options.dropout,
        sample_size=spec.size,
        patch_size=options.patch,
        num_embeds_ada_norm=spec.num_classes,
        norm_eps=options.epsilon,
    )
    for block in module.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
        block.norm1.emb.class_embedder.dropout_prob = 0.0
    return module


def lean_dit(options: DiTOptions, spec: ImageSpec, channels_out: int | None = None) -> "LeanDiT":
    """The same, lean: called alike, with label None where there are no classes, it returns f32[B,channels_out,H,W]."""
    _check(options)
    return LeanDiT(options, spec, channels_out or spec.channels)


def _check(options: DiTOptions) -> None:
    for name, value in PUBLISHED.items():
        if getattr(options, name) != value:
            raise ValueError(f"the twins of a DiT need {name} = {value!r}, not {getattr(options, name)!r}")
    if options.mlp_ratio != 4.0:
        raise ValueError(f"the twins of a DiT need mlp_ratio = 4, not {options.mlp_ratio}")


# ---------------------------------------------------------------------------------------------- the lean module


class LeanDiT(nn.Module):
    """Peebles & Xie 2022 with adaLN-Zero, attention by `scaled_dot_product_attention`."""

    def __init__(self, options: DiTOptions, spec: ImageSpec, channels_out: int) -> None:
        super().__init__()
        width, patch, grid = options.width, options.patch, spec.size // options.patch
        self.patch_size, self.grid = patch, grid
        self.patch_in = nn.Conv2d(spec.channels, width, patch, patch)
        self.register_buffer("positions", torch.tensor(np.asarray(positions_2d(grid, grid, width))))
        self.time_in, self.time_out = nn.Linear(256, width), nn.Linear(width, width)
        self.label = nn.Embedding(spec.num_classes + 1, width) if spec.num_classes else None
        self.blocks = nn.ModuleList(LeanBlock(options) for _ in range(options.depth))
        self.out_modulation = nn.Linear(width, 2 * width)
        self.patch_out = nn.Linear(width, patch**2 * channels_out)

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None) -> Tensor:
        """See `lean_dit`."""
        tokens = self.patch_in(x).flatten(2).transpose(1, 2) + self.positions
        frequencies = torch.exp(-math.log(10_000.0) / 128 * torch.arange(128, device=x.device))
        angles = time[:, None] * frequencies
        sinusoids = torch.cat([angles.cos(), angles.sin()], -1).to(x.dtype)
        condition = self.time_out(F.silu(self.time_in(sinusoids)))
        if label is not None:
            condition = condition + self.label(label)
        condition = F.silu(condition)
        for block in self.blocks:
            tokens = block(tokens, condition)
        shift, scale = self.out_modulation(condition)[:, None].chunk(2, -1)
        tokens = self.patch_out(_norm(tokens) * (1 + scale) + shift)
        y = tokens.unflatten(1, (self.grid, self.grid)).unflatten(-1, (self.patch_size, self.patch_size, -1))
        return y.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


class LeanBlock(nn.Module):
    """Attention and MLP, each shifted, scaled and gated."""

    def __init__(self, options: DiTOptions) -> None:
        super().__init__()
        width = options.width
        self.heads, self.dropout = options.heads, options.dropout
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv, self.attention_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp_in, self.mlp_out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """[B,T,width], [B,width] -> [B,T,width]."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(condition)[:, None].chunk(6, -1)
        qkv = self.qkv(_norm(x) * (1 + scale_a) + shift_a).unflatten(-1, (3, self.heads, -1))
        y = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4)).transpose(1, 2).flatten(2)
        x = x + gate_a * F.dropout(self.attention_out(y), self.dropout, self.training)
        y = F.gelu(self.mlp_in(_norm(x) * (1 + scale_m) + shift_m), approximate="tanh")
        return x + gate_m * F.dropout(self.mlp_out(y), self.dropout, self.training)


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


# ---------------------------------------------------------------------------------------------- weights

OUTER = {"patch_in": "pos_embed.proj", "out_modulation": "proj_out_1", "patch_out": "proj_out_2"}
OF_A_BLOCK = {
    "modulation": "norm1.linear",
    "attention_out": "attn1.to_out.0",
    "mlp_in": "ff.net.0.proj",
    "mlp_out": "ff.net.2",
}
OF_EVERY_BLOCK = {
    "time.in": "norm1.emb.timestep_embedder.linear_1",
    "time.out": "norm1.emb.timestep_embedder.linear_2",
    "label": "norm1.emb.class_embedder.embedding_table",
}
"""Our name -> diffusers', of layers; those of the condition are in every block of theirs."""


def load(module: DiTTransformer2DModel | LeanDiT, params: Tree) -> None:
    """Copy our parameters into a module that `torch_dit` or `lean_dit` made of the same options.

    Raises:
      RuntimeError: where a weight of either has no counterpart, or one of another shape.
    """
    state = {name: value for name, value in module.named_buffers() if name in module.state_dict()}
    for layer, weights in _layers(params):
        if layer == "patch_in":  # a matrix of [patch, patch, channels] rows as a convolution's kernel
            patches = weights["weight"].reshape(len(weights["weight"]), module.patch_size, module.patch_size, -1)
            weights["weight"] = patches.transpose(0, 3, 1, 2)
        for name, arrays in (
            _lean(layer, weights) if isinstance(module, LeanDiT) else _diffusers(layer, weights, module)
        ):
            state |= {f"{name}.{key}": torch.tensor(array) for key, array in arrays.items()}
    module.load_state_dict(state)


def _layers(part: Mapping, prefix: str = "") -> Iterator[tuple[str, Weights]]:
    """Layers by names such as `block_0.qkv`, their weights as torch has them."""
    for name, value in part.items():
        if not isinstance(value, Mapping):
            yield prefix + name, {"weight": np.asarray(value)}
        elif "kernel" in value:
            yield prefix + name, {"weight": np.asarray(value["kernel"]).T, "bias": np.asarray(value["bias"])}
        else:
            yield from _layers(value, f"{prefix}{name}.")


def _lean(layer: str, weights: Weights) -> Iterator[tuple[str, Weights]]:
    """`blocks.0.qkv` of `block_0.qkv`, `time_in` of `time.in`."""
    yield re.sub(r"^block_(\d+)", r"blocks.\1", layer).replace("time.", "time_"), weights


def _diffusers(layer: str, weights: Weights, module: nn.Module) -> Iterator[tuple[str, Weights]]:
    """Where in diffusers' module the weights of one of our layers go."""
    block = re.fullmatch(r"block_(\d+)\.(\w+)", layer)
    if layer in OUTER:
        yield OUTER[layer], weights
    elif layer in OF_EVERY_BLOCK:
        for i in range(len(module.transformer_blocks)):
            yield f"transformer_blocks.{i}.{OF_EVERY_BLOCK[layer]}", weights
    elif block[2] == "qkv":
        thirds = {key: np.split(array, 3) for key, array in weights.items()}
        for i, name in enumerate("qkv"):
            of_one = {key: third[i] for key, third in thirds.items()}
            yield f"transformer_blocks.{block[1]}.attn1.to_{name}", of_one
    else:
        yield f"transformer_blocks.{block[1]}.{OF_A_BLOCK[block[2]]}", weights
