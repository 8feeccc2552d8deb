"""A run, assembled from its config: what all commands share. Building one compiles nothing and writes nothing."""

import functools
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from diffusion_jax import data, families, latents, plugs, rng, settings
from diffusion_jax.data import augment
from diffusion_jax.data.source import Dataset, to_float, to_uint8
from diffusion_jax.errors import UserError, require
from diffusion_jax.evaluation import cost, features, likelihood, real, reconstruction, report
from diffusion_jax.sampling import Sampler
from diffusion_jax.training import logbook, loop, sharding
from diffusion_jax.training.checkpoint import abstract_like
from diffusion_jax.training.step import Trainer
from diffusion_jax.types import Array, Batch, Family, ImageSpec, Tree, Weights


@dataclass(frozen=True, kw_only=True)
class Model:
    """What a config says of the model: enough to sample, without the data.

    Attributes:
      config: nested plain dictionaries, as JSON keeps them.
      options: the config's own sampling options.
    """

    config: dict[str, Any]
    settings: settings.Settings
    spec: ImageSpec
    family: Family
    mesh: Mesh
    sampler: Sampler
    options: Tree

    def weights_like(self) -> Weights:
        """Shapes and shardings of the weights."""
        shapes = weight_shapes(self.family)
        return abstract_like(shapes, sharding.infer({"params": shapes}, self.mesh, self.settings.mesh)["params"])


@dataclass(frozen=True, kw_only=True)
class Run(Model):
    """Everything that a config describes: the model, its data and its training."""

    dataset: Dataset
    trainer: Trainer
    augmentation: augment.Augmentation | None

    def feed(self) -> data.Feed:
        """The training batches."""
        train = self.settings.train
        return data.build_feed(
            self.dataset,
            batch_size=train.batch_size,
            seed=self.settings.seed,
            rows=NamedSharding(self.mesh, sharding.BATCH),
            steps_per_chunk=train.log_every,
            device_megabytes=self.settings.data.device_megabytes,
        )

    def program(self, feed: data.Feed) -> loop.Program:
        """The training run: traced, so that it is known to work, and not compiled yet.

        Raises:
          UserError: where some option has a value that nothing has refused so far, and with which it cannot be traced.
        """
        try:
            program = loop.compile_program(self.trainer, feed, self.mesh, self.settings.mesh, self.augmented)
            jax.eval_shape(program.advance, program.abstract, feed.chunk(0, 1), jnp.int32(1), {})
        except (TypeError, ValueError, AttributeError) as error:
            reason = str(error).strip().split("\n")[0]
            raise UserError(f"this config cannot be trained ({type(error).__name__}: {reason[:200]}).") from error
        return program

    def augmented(self, batch: Batch, key: Array) -> Batch:
        """The batch as the config wants its training images, by the key of a step."""
        if self.settings.data.flip:
            batch = augment.flip(batch, key)
        return self.augmentation(batch, key) if self.augmentation else batch

    @functools.cached_property
    def extractor(self) -> features.Features:
        """The space in which images are judged; fitted to the training images once, then kept in the user's cache."""
        return features.build(self.dataset)

    def glance(self, weights: Weights) -> dict[str, Any]:
        """A light judgement of samples with the config's own options, for the way: see `report.judge`."""
        count = self.settings.evaluate.light_samples
        rows = self.sampler.labels(count)
        images = self.sampler.draw(weights, self.settings.seed, rows, count, self.options)
        return self.judge_samples(images, rows.get("label"), light=True)

    def evaluate(self, workdir: Path, weights: Weights, profile: str, step: int) -> dict[str, Any]:
        """What stands in evaluation.json: the judgement of samples with the config's own options, and what they cost.

        Args:
          workdir: of the run, whose metrics.jsonl says how long it trained.
          weights: at `step`, of the averaging profile `profile`.
          profile: its name.
          step: finished steps.
        """
        count = self.settings.evaluate.num_samples
        rows = self.sampler.labels(count)
        draw = lambda count: self.sampler.draw(weights, self.settings.seed, rows, count, self.options)
        draw(1)  # compiles
        start = time.perf_counter()
        images = draw(count)
        seconds = (time.perf_counter() - start) / count
        judged = self.judge_samples(images, rows.get("label"))
        spent = {
            "parameters": cost.parameters(weights),
            "training": self.training_cost(workdir, step),
            "sampling": self.sampling_cost(weights, self.options) | {"seconds": seconds},
            "device": jax.devices()[0].device_kind,
            "devices": jax.device_count(),
        }
        return {"step": step, "ema": profile} | judged | {"cost": spent}

    def training_cost(self, workdir: Path, step: int) -> dict[str, Any]:
        """Images, FLOPs and seconds of the first `step` steps; seconds are None for runs that did not keep them."""
        size = self.settings.train.batch_size
        state, batch = jax.eval_shape(self.trainer.init), cost.batch_like(self.family, self.spec, size)
        flops = cost.training_flops(self.family, self.trainer.update, state, batch)
        seconds = logbook.seconds_until(workdir / "metrics.jsonl", step)
        return {
            "steps": step,
            "images": step * size,
            "flops": step * flops,
            "seconds": None if math.isnan(seconds) else seconds,
        }

    def sampling_cost(self, weights: Weights, options: Tree) -> dict[str, Any]:
        """Evaluations of the network and FLOPs an image."""
        size = self.sampler.batch_size
        asked = cost.evaluations(self.family, self.spec, weights, options)
        flops = cost.sampling_flops(self.family, self.spec, weights, options, size, asked)
        return {"evaluations": asked, "flops": flops, "batch_size": size}

    def check_measurable(self, likelihood: int, reconstructions: int) -> None:
        """Raise `UserError` where images are asked for that the family cannot rate, or cannot encode."""
        name = self.family.name
        require(not likelihood or self.family.nll is not None, "--likelihood", likelihood, f"{name} has no likelihood")
        if reconstructions:
            latents.latent_of(self.family, "--reconstructions", reconstructions, encodes=True)
            rule = f"{name} encodes by its solver; `diffusion-jax edit --edit=reconstruct` does that"
            require(self.family.denoise is None, "--reconstructions", reconstructions, rule)

    def likelihood(self, weights: Weights, count: int) -> dict[str, Any]:
        """Bits per dimension of `count` held-out images (all, where there are no more)."""
        rows = self.held_out(count)
        act = lambda weights, keys, rows, key: self.family.nll(weights, rows, key)
        measure = Sampler(act, self.spec, self.mesh, self.settings.sample.batch_size)
        key = rng.stream(self.settings.seed, "likelihood")
        bits = np.concatenate(list(measure.batches(weights, 0, rows, len(rows["index"]), key)))
        return likelihood.summarise(bits) | {"dequantised": self.family.dequantised}

    def reconstruction(self, weights: Weights, count: int) -> dict[str, Any]:
        """How near `count` held-out images come to themselves, to the latent and back: see `reconstruction.judge`."""
        rows = self.held_out(count)
        act = functools.partial(latents.reconstruct, self.family.latent)
        back = Sampler(act, self.spec, self.mesh, self.settings.sample.batch_size)
        made = back.draw(weights, self.settings.seed, rows, len(rows["index"]), self.options)
        return reconstruction.judge(to_uint8(rows["image"], self.spec.levels), made, self.extractor)

    def held_out(self, count: int) -> dict[str, np.ndarray]:
        """`image`, `index` and, of data with classes, `label` of `count` held-out images (all, if there are fewer)."""
        chosen = real.choose(self.dataset.held_out, count)
        rows = {"image": to_float(chosen.image), "index": np.arange(len(chosen), dtype=np.int32)}
        return rows if chosen.label is None else rows | {"label": chosen.label.astype(np.int32)}

    def judge_samples(self, images: np.ndarray, labels: np.ndarray | None, light: bool = False) -> dict[str, Any]:
        """Judge images uint8 [N,H,W,C] against held-out images."""
        report.check(images, labels, self.dataset)
        return report.judge(images, labels, self.dataset, self.extractor, self.settings.evaluate, light=light)


def assemble_model(config: Mapping[str, Any], spec: ImageSpec, mesh: Mesh | None = None) -> Model:
    """Check a config and build its model for images of `spec`, on all devices where no mesh is given.

    Raises:
      UserError: naming the field, its value and what would be right.
    """
    checked = settings.from_config(config)
    mesh = mesh or sharding.make_mesh(settings.MeshSettings())
    family = families.build(checked.family, spec, checked.precision)
    return Model(
        config=plain(config),
        settings=checked,
        spec=spec,
        family=family,
        mesh=mesh,
        sampler=Sampler(family.generate, spec, mesh, checked.sample.batch_size),
        options=family.sampling(checked.sampling),
    )


def assemble(config: Mapping[str, Any], training: bool = True) -> Run:
    """Check a config and build all that it names.

    Args:
      config: nested dictionaries.
      training: False for a run that is only judged: then all devices share the batch, whatever mesh it was trained on.

    Raises:
      UserError: naming the field, its value and what would be right.
    """
    checked = settings.from_config(config)
    mesh = sharding.make_mesh(checked.mesh if training else settings.MeshSettings())
    if training:
        micro = checked.train.batch_size // checked.train.accumulate
        sharding.check_batch(mesh, "train.batch_size / train.accumulate", micro)
    dataset = data.build(checked.data)
    model = assemble_model(config, dataset.spec, mesh)
    if training:
        sharding.check_rules(checked.mesh, weight_shapes(model.family))
    trainer = Trainer(model.family, checked.train, checked.seed)
    return Run(
        **vars(model),
        dataset=dataset,
        trainer=trainer,
        augmentation=build_augmentation(checked.data.augment, model.family),
    )


def build_augmentation(text: str, family: Family) -> augment.Augmentation | None:
    """The augmentation that `text` names, whose labels the family's network must take; None where it is empty.

    Raises:
      UserError: also where one of the two is there without the other.
    """
    if not text:
        rule = f"must name an augmentation: the network expects its label, of width {family.augment}, unless augment=0"
        require(not family.augment, "data.augment", text, rule)
        return None
    augmentation = plugs.build("data.augment", text, augment.AUGMENTATIONS)
    rule = f"would show in the samples unless the network takes its label: a ddpmpp with augment={augmentation.width}"
    require(family.augment == augmentation.width, "data.augment", text, rule)
    return augmentation


def weight_shapes(family: Family) -> Weights:
    """The family's weights as shapes."""
    return jax.eval_shape(family.init, jax.random.key(0))[0]


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config as JSON gives it back: tuples are lists."""
    return json.loads(json.dumps(config))
