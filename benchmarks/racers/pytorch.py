"""PyTorch's side of a race: the twins of our networks with our weights, in several forms.

    eager, compiled                         the module as it is, and under `torch.compile`
    eager channels_last, compiled ...       convolutions with the channels last in memory
    diffusers                               a DiT as diffusers has it, which embeds the condition in every block

In bfloat16, denoising has its weights in bfloat16, and training runs under `torch.autocast`.
"""

import pickle
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.racers import Task, race
from benchmarks.twins import dit, unet
from diffusion_jax import networks
from diffusion_jax.networks.presets import PRESETS, expand
from diffusion_jax.types import Tree


def prepare(task: Task) -> tuple[Callable[[], None], dict[str, Any]]:
    """See `racers.Prepare`."""
    torch.set_num_threads(task.threads)
    folder, dtype = Path(task.folder), getattr(torch, task.dtype)
    given = pickle.loads((folder / "inputs.pickle").read_bytes())
    module = twin(task, pickle.loads((folder / "params.pickle").read_bytes())).to(task.device)
    layout = torch.channels_last if "channels_last" in task.form else torch.contiguous_format
    module = module.to(memory_format=layout)
    images = lambda x: torch.tensor(x).permute(0, 3, 1, 2).to(task.device).contiguous(memory_format=layout)
    x, target = images(given["x"]), images(given["target"])
    time = 1000.0 * torch.tensor(given["time"], device=task.device)
    label = None if given["label"] is None else torch.tensor(given["label"], device=task.device).long()
    about = {"torch": torch.__version__}

    if task.what == "train":
        return waited(task, training(task, module, (x, time, label), target, dtype)), about

    module.eval().to(dtype)
    forward = compiled(task, module)
    x = x.to(dtype)

    def denoise() -> Tensor:
        with torch.no_grad():
            return output(forward(x, time, label))

    np.save(folder / "theirs.npy", denoise().float().permute(0, 2, 3, 1).cpu().numpy())
    return waited(task, denoise), about


def twin(task: Task, params: Tree) -> nn.Module:
    """The module in float32."""
    preset = PRESETS[task.network]
    row, given = expand("network", task.network)
    options = networks.BACKBONES[row][0](**given)
    if row == "dit":
        build, load = (dit.torch_dit if task.form == "diffusers" else dit.lean_dit), dit.load
    else:
        build, load = unet.torch_unet, unet.load
    module = build(options, preset.image, preset.channels_out)
    load(module, params)
    return module


def training(
    task: Task, module: nn.Module, given: tuple[Tensor | None, ...], target: Tensor, dtype: torch.dtype
) -> Callable[[], None]:
    """One step with PyTorch's fastest AdamW."""
    module.train()
    forward = compiled(task, module)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, weight_decay=1e-4, fused=True)
    arithmetic = torch.autocast(task.device, dtype) if dtype != torch.float32 else nullcontext()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with arithmetic:
            y = output(forward(*given))
        (y.float() - target).square().mean().backward()
        optimizer.step()

    return step


def compiled(task: Task, module: nn.Module) -> Callable:
    """The module, or what `torch.compile` makes of it."""
    return torch.compile(module) if task.form.startswith("compiled") else module


def output(y: Any) -> Tensor:
    """diffusers' modules return an object."""
    return y if isinstance(y, Tensor) else y.sample


def waited(task: Task, step: Callable[[], Any]) -> Callable[[], None]:
    """The step, and the device's end of it."""

    def act() -> None:
        step()
        if task.device == "cuda":
            torch.cuda.synchronize()

    return act


if __name__ == "__main__":
    race(prepare)
