"""One training step: the players' updates in order, the averages, and what happens when something is not finite."""

from collections.abc import Mapping
from dataclasses import replace

import jax
import jax.numpy as jnp
import optax

from diffusion_jax import rng, tree
from diffusion_jax.settings import TrainSettings
from diffusion_jax.training import ema, optimizer
from diffusion_jax.types import Array, Aux, Batch, Context, Family, Metrics, Player, TrainState, Tree


class Trainer:
    """The pure functions `init` and `step` of a family under given training settings.

    Raises:
      UserError: when built with an unknown optimizer, schedule or averaging rule.
    """

    def __init__(self, family: Family, train: TrainSettings, seed: int) -> None:
        self.family = family
        self.train = train
        self.seed = seed
        self.optimizers = {player.name: optimizer.build(train, player.every, player.start) for player in family.players}
        self.rules = ema.averaging_rules(train)

    def init(self) -> TrainState:
        """The state before the first step: a pure function of the seed."""
        params, extra = self.family.init(rng.stream(self.seed, "init"))
        return TrainState(
            step=jnp.int32(0),
            params=params,
            opt_state={name: it.init(params[name]) for name, it in self.optimizers.items()},
            ema={name: jax.tree.map(jnp.array, params) for name in self.rules},
            extra=extra,
            skipped={"total": jnp.int32(0), "in_a_row": jnp.int32(0)},
        )

    def step(self, state: TrainState, batch: Batch, frozen: Tree) -> tuple[TrainState, Metrics]:
        """One step: every player whose turn it is, then the averages.

        Args:
          state: as `init` or the step before left it.
          batch: `image` u8 or f32 in [-1,1] [B,H,W,C], or `encoded`; `label`, `index`.
          frozen: parameters of other models.

        Returns:
          The next state and this step's metrics, f32[] each. An update with a loss or gradient that is not finite is
          left out and counted. After `max_skipped` such steps in a row nothing changes any more but `step`: the loop
          will find out at its next log line, and the parameters will not have moved meanwhile.
        """
        if "image" in batch:
            batch = {**batch, "image": as_float(batch["image"])}
        finite, metrics, new = jnp.bool_(True), {}, state
        for player in self.family.players:
            new, fine, seen = self.turn(player, new, batch, frozen)
            finite, metrics = finite & fine, metrics | seen

        stopped = state.skipped["in_a_row"] >= self.train.max_skipped
        # The flag is made of all leaves; without the barrier XLA's CPU compiler makes it anew for each of them.
        new = tree.where(jax.lax.optimization_barrier(finite & ~stopped), self.average(new), state)
        missed = (~finite).astype(jnp.int32)
        in_a_row = jnp.where(stopped, state.skipped["in_a_row"], (state.skipped["in_a_row"] + 1) * missed)
        skipped = {"total": state.skipped["total"] + missed, "in_a_row": in_a_row}
        return replace(new, step=state.step + 1, skipped=skipped), metrics

    def turn(self, player: Player, state: TrainState, batch: Batch, frozen: Tree) -> tuple[TrainState, Array, Metrics]:
        """Update a player if it is its turn; its metrics are NaN where it is not."""

        def act() -> tuple[TrainState, Array, Metrics]:
            return self.update(player, state, batch, frozen)

        def rest() -> tuple[TrainState, Array, Metrics]:
            metrics = jax.eval_shape(act)[2]
            return state, jnp.bool_(True), jax.tree.map(lambda m: jnp.full(m.shape, jnp.nan, m.dtype), metrics)

        if player.every == 1 and player.start == 0:
            return act()
        due = (state.step % player.every == 0) & (state.step >= player.start)
        return jax.lax.cond(due, act, rest)

    def update(
        self, player: Player, state: TrainState, batch: Batch, frozen: Tree
    ) -> tuple[TrainState, Array, Metrics]:
        """One player's update: (state, whether loss, gradient and result are finite, metrics)."""
        loss, aux, gradient = self.gradient(player, state, batch, frozen)
        norm = tree.norm(gradient)
        params = state.params[player.name]
        change, opt_state = self.optimizers[player.name].update(gradient, state.opt_state[player.name], params)
        params = optax.apply_updates(params, jax.tree.map(lambda c: player.rate * c, change))
        params = player.project(params) if player.project else params
        params = player.settle(params, aux.extra) if player.settle else params
        new = replace(
            state,
            params=state.params | {player.name: params},
            opt_state=state.opt_state | {player.name: opt_state},
            extra=aux.extra,
        )
        metrics = {"loss": loss, "gradient_norm": norm} | aux.metrics
        if len(self.family.players) > 1:
            metrics = {f"{player.name}/{key}": value for key, value in metrics.items()}
        return new, jnp.isfinite(loss) & jnp.isfinite(norm) & tree.all_finite(new.params[player.name]), metrics

    def gradient(self, player: Player, state: TrainState, batch: Batch, frozen: Tree) -> tuple[Array, Aux, Tree]:
        """(loss, aux, gradient) of one player, averaged over `accumulate` microbatches."""
        common = rng.stream(self.seed, "train", state.step)
        key = rng.stream(common, player.name)

        def loss(own: Tree, extra: Tree, micro: Batch) -> tuple[Array, Aux]:
            ctx = Context(
                batch=micro, key=key, common=common, step=state.step, extra=extra, ema=state.ema, frozen=frozen
            )
            return player.loss(state.params | {player.name: own}, ctx)

        value_and_grad = jax.value_and_grad(loss, has_aux=True)
        own = state.params[player.name]
        if self.train.accumulate == 1:
            (value, aux), gradient = value_and_grad(own, state.extra, batch)
            return value, aux, gradient

        def add(carry: tuple, micro: Batch) -> tuple[tuple, None]:
            extra, total = carry
            (value, aux), gradient = value_and_grad(own, extra, micro)
            return (aux.extra, jax.tree.map(jnp.add, total, (value, aux.metrics, gradient))), None

        micros = jax.tree.map(self.split, batch)
        first = jax.tree.map(lambda x: x[0], micros)
        (shape, aux_shape), gradient_shape = jax.eval_shape(value_and_grad, own, state.extra, first)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (shape, aux_shape.metrics, gradient_shape))
        (extra, total), _ = jax.lax.scan(add, (state.extra, zeros), micros)
        value, metrics, gradient = jax.tree.map(lambda x: x / self.train.accumulate, total)
        return value, Aux(metrics=metrics, extra=extra), gradient

    def split(self, x: Array) -> Array:
        """[B, ...] -> [accumulate, B / accumulate, ...]; each device keeps the rows it has."""
        return x.reshape(x.shape[0] // self.train.accumulate, self.train.accumulate, *x.shape[1:]).swapaxes(0, 1)

    def average(self, state: TrainState) -> TrainState:
        """Every profile's ema <- decay ema + (1 - decay) params."""

        def towards(rule: ema.Rule, old: Tree) -> Tree:
            decay = rule((state.step + 1).astype(jnp.float32))
            return jax.tree.map(lambda e, p: decay * e + (1.0 - decay) * p, old, state.params)

        averages = {name: towards(rule, state.ema[name]) for name, rule in self.rules.items()}
        return replace(state, ema=averages)

    def weights(self, state: TrainState, profile: str) -> Mapping[str, Tree]:
        """The weights to sample with: an averaging profile's, or the plain parameters for "none"."""
        return state.params if profile == "none" else state.ema[profile]


def as_float(image: Array) -> Array:
    """f32 in [-1, 1] from u8 in 0..255; float images pass."""
    return image.astype(jnp.float32) / 127.5 - 1.0 if image.dtype == jnp.uint8 else image
