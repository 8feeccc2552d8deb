"""Small things to train: a family whose every update can be written down, and a digits run of a few seconds."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from diffusion_jax import families, settings
from diffusion_jax.data import digits
from diffusion_jax.data.feed import resident
from diffusion_jax.training import sharding
from diffusion_jax.training.loop import compile_program
from diffusion_jax.training.step import Trainer
from diffusion_jax.types import Aux, Context, Family, Player

NETWORK = "dit(patch=4,width=32,depth=1,heads=2)"


def mesh(data: int = 1, fsdp: int = 1, tensor: int = 1) -> jax.sharding.Mesh:
    devices = jax.devices()[: data * fsdp * tensor]
    auto = (jax.sharding.AxisType.Auto,) * 3
    return jax.make_mesh((data, fsdp, tensor), ("data", "fsdp", "tensor"), axis_types=auto, devices=devices)


def digits_run(on: jax.sharding.Mesh, network: str = NETWORK, precision: str = "float32", **train):
    """(trainer, program, feed) of a small diffusion model on digits over the mesh `on`."""
    chosen = settings.TrainSettings(**{"batch_size": 16, "log_every": 4, "steps": 8} | train)
    dataset = digits.build(settings.DataSettings(), "")
    section, _ = families.default_fields("diffusion")
    family = families.build({**section, "network": network}, dataset.spec, precision)
    trainer = Trainer(family, chosen, seed=0)
    rows = NamedSharding(on, sharding.BATCH)
    feed = resident(dataset.train, chosen.batch_size, 0, rows, capacity=chosen.log_every)
    return trainer, compile_program(trainer, feed, on, settings.MeshSettings()), feed


def leader_and_follower(follower_every: int = 1) -> Family:
    """Two players, one number each: the leader's loss is leader * mean(image), the follower's leader * follower.

    With SGD at rate r the leader falls by r mean(image), and the follower by r times the leader's NEW value.
    """

    def leader(params, ctx: Context):
        return params["leader"]["w"] * jnp.mean(ctx.batch["image"]), Aux(metrics={}, extra=ctx.extra)

    def follower(params, ctx: Context):
        extra = {"seen": ctx.extra["seen"] + 1}
        return params["leader"]["w"] * params["follower"]["w"], Aux(metrics={}, extra=extra)

    return Family(
        name="toy",
        players=(Player(name="leader", loss=leader), Player(name="follower", loss=follower, every=follower_every)),
        init=lambda key: ({name: {"w": jnp.float32(1.0)} for name in ("leader", "follower")}, {"seen": jnp.int32(0)}),
        generate=lambda weights, keys, condition, options: None,
        sampling=lambda section: None,
    )


def batch(value: float, size: int = 4) -> dict:
    return {"image": jnp.full((size, 1, 1, 1), value), "index": jnp.arange(size, dtype=jnp.int32)}
