"""What a model costs: counted from shapes and by running its sampler once, so that no clock is asked for these.

FLOPs are twice the multiply-adds of products and convolutions, as `networks.flops` counts them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax import rng, tree
from diffusion_jax.networks.flops import multiply_adds_of
from diffusion_jax.types import Batch, Denoised, Family, ImageSpec, Player, TrainState, Tree, Weights

# ---------------------------------------------------------------------------------------------- training


def training_flops(
    family: Family,
    update: Callable[[Player, TrainState, Batch, Tree], Any],
    state: TrainState,
    batch: Batch,
    frozen: Tree,
    steps: int,
) -> float:
    """FLOPs of `steps` steps on batches such as `batch`: of each player's update, in the steps that are its turn.

    They are those of the program as it is written. What the compiler computes once for two players counts twice, and a
    penalty that is due in some steps only counts as if it were due in all: which, the shapes do not tell. Updates of
    averages are left out.

    Args:
      family: whose players are trained.
      update: (player, state, batch, frozen) -> anything, such as the trainer's.
      state: shapes suffice, as they do of `batch`.
      batch: see `batch_like`.
      frozen: parameters of other models.
      steps: from the first one on; a player takes part from its `start` on, in each `every`-th.
    """
    turns = lambda player: max(0, steps - player.start) / player.every
    turn = lambda player: multiply_adds_of(partial(update, player), state, batch, frozen)
    return sum(2.0 * turn(player) * turns(player) for player in family.players)


def batch_like(family: Family, spec: ImageSpec, size: int, encoded: bool = False) -> Batch:
    """Shapes of a training batch of `size` images, or of what the family's first stage has `encoded` them as."""
    number, first = jax.ShapeDtypeStruct((size,), jnp.int32), family.first_stage
    batch = {"index": number}
    if encoded:
        batch["encoded"] = jax.ShapeDtypeStruct((size, *first.shape), first.dtype)
    else:
        batch["image"] = jax.ShapeDtypeStruct((size, *spec.shape), jnp.float32)
    batch |= {"label": number} if spec.num_classes else {}
    return batch | ({"augment": jax.ShapeDtypeStruct((size, family.augment), jnp.float32)} if family.augment else {})


# ---------------------------------------------------------------------------------------------- sampling


def evaluations(family: Family, spec: ImageSpec, weights: Weights, options: Tree) -> float:
    """How many images the network is given while image 0, of class 0, is made with `options` of `generate`.

    The image is made, so that the second half of guidance's doubled batch counts where it is evaluated and not where
    it is skipped, and a solver that chooses its own steps is taken at its word.
    """
    if family.counted is None:
        return 1
    given: list[int] = []
    generate = jax.jit(family.counted(given.append).generate)
    weights = jax.device_put(weights, jax.local_devices()[0])  # one image is made on one device
    keys = rng.sample_keys(jnp.uint32(0), jnp.zeros((1,), jnp.int32))
    condition = {"label": jnp.zeros((1,), jnp.int32)} if spec.num_classes else {}
    jax.block_until_ready(generate(weights, keys, condition, options))
    jax.effects_barrier()
    return sum(given)


def sampling_flops(
    family: Family, spec: ImageSpec, weights: Weights, options: Tree, batch_size: int, evaluations: float
) -> float:
    """FLOPs an image, sampled `batch_size` at once: of `generate`, or of so many evaluations where those are counted.

    In the latter case what makes images of latents or tokens comes on top, once. Gradients of a classifier, which guide
    some samplers, are not among them. `weights` may be shapes.
    """
    if family.counted is None:
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch_size))
        number = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
        condition = {"label": number} if spec.num_classes else {}
        return 2.0 * multiply_adds_of(family.generate, weights, keys, condition, options) / batch_size
    first, decoding = family.first_stage, 0.0
    if first:
        decoding = 2.0 * multiply_adds_of(first.decode, weights, jax.ShapeDtypeStruct((1, *first.shape), first.dtype))
    shape = family.latent.shape if family.latent else spec.shape
    x, t = jax.ShapeDtypeStruct((1, *shape), jnp.float32), jax.ShapeDtypeStruct((), jnp.float32)
    label = jax.ShapeDtypeStruct((1,), jnp.int32) if spec.num_classes else None
    if family.run is not None:
        condition = {"label": label} if spec.num_classes else {}
        return decoding + 2.0 * evaluations * multiply_adds_of(family.run, weights, condition)

    def ask(weights: Weights, *points: Any) -> list[Denoised]:
        denoise = family.denoise(weights)
        return [denoise(*point) for point in points]

    # What prepares the weights is written as a forward pass of which little is computed, and that once for all steps.
    once = multiply_adds_of(ask, weights, (x, t, label)) - multiply_adds_of(ask, weights)
    return decoding + 2.0 * evaluations * once


# ---------------------------------------------------------------------------------------------- all of it


def parameters(weights: Weights) -> dict[str, Any]:
    """Numbers that sampling or training needs: `total`, and of each player, and a frozen first stage, in `players`."""
    players = {name: tree.count(params) for name, params in weights.items()}
    return {"total": sum(players.values()), "players": players}


def render(cost: dict[str, Any]) -> str:
    """Two lines."""
    train, sample = cost["training"], cost["sampling"]
    seconds = "an unknown time" if train["seconds"] is None else f"{train['seconds']:.0f} s"
    return (
        f"{cost['parameters']['total']:,} parameters, trained for {seconds} with {train['flops']:.3g} FLOPs "
        f"on {train['images']:,} images.\n"
        f"Network evaluations a sample: {sample['evaluations']}; it takes {sample['flops']:.3g} FLOPs and "
        f"{1e3 * sample['seconds']:.3g} ms, {sample['batch_size']} at once on {cost['devices']} {cost['device']}."
    )
