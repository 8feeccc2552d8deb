"""A run, assembled from its config: what all commands share. Building one compiles nothing and writes nothing."""

import functools
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from diffusion_jax import data, latents, plugs, rng, settings, tree
from diffusion_jax.cli import drawing
from diffusion_jax.cli.model import NOTHING, Frozen, Model, assemble_model, standardising, thawed, weight_shapes
from diffusion_jax.cli.workdir import config_of
from diffusion_jax.data import augment, encoded
from diffusion_jax.data.source import Dataset, to_float, to_uint8
from diffusion_jax.errors import UserError, require
from diffusion_jax.evaluation import cost, features, likelihood, real, reconstruction, report
from diffusion_jax.sampling import Sampler
from diffusion_jax.tokenizers.bottlenecks import codes as codebooks
from diffusion_jax.training import logbook, loop, sharding
from diffusion_jax.training.step import Trainer
from diffusion_jax.types import Array, Batch, Family, TrainState, Tree, Weights

STILL = 1e-4
"""A deviation of latents below this is rounding's."""


@dataclass(frozen=True, kw_only=True)
class Run(Model):
    """Everything that a config describes: the model, its data and its training.

    Attributes:
      frozen: parameters of other runs, once they are `thawed`.
      codes: the training images as a frozen tokenizer has them, likewise; None where nobody reads those.
    """

    dataset: Dataset
    trainer: Trainer
    augmentation: augment.Augmentation | None
    frozen: Frozen = NOTHING
    codes: encoded.EncodedSource | None = None

    # ------------------------------------------------------------------------------------------ training

    def thawed(self, record: Mapping[str, Any] | None) -> "Run":
        """The run with the frozen parameters that its family needs: those of `record`, or for a new run the newest.

        `record` is what a checkpoint says of them: see `model.Trained.load`.
        """
        frozen = thawed(self, record)
        measured = self.tokenizer and self.family.first_stage.measured and "shift" not in frozen.about
        codes = self.encoded(frozen) if self.reads_encoded or measured else None
        if measured:
            mean, std = codes.moments()
            # A channel that never moves, such as a digit that is always the same, is centred and left at that.
            frozen = standardising(frozen, self.mesh, mean, 1.0 / np.where(std < STILL, 1.0, std))
        return replace(self, frozen=frozen, codes=codes)

    def encoded(self, frozen: Frozen) -> encoded.EncodedSource:
        """The training images as the frozen tokenizer has them, from the cache or made now."""
        first, size = self.family.first_stage, self.settings.sample.batch_size
        act = lambda weights, keys, rows, options: first.encode(weights, rows["image"])
        reader, weights = Sampler(act, self.spec, self.mesh, size), frozen.as_weights()
        encode = lambda images: np.concatenate(list(reader.batches(weights, 0, {"image": images}, len(images), ())))
        of = self.settings.data
        what = (of.name, of.image_size, of.train_split, of.data_dir, first.dtype.__name__, frozen.about["hash"])
        return encoded.fetch(self.dataset.train, what, encode)

    @property
    def reads_encoded(self) -> bool:
        """Whether training reads what a frozen tokenizer has made of the images, which are the same each time."""
        return bool(self.tokenizer) and not (self.settings.data.flip or self.augmentation)

    def feed(self) -> data.Feed:
        """The training batches; what a frozen tokenizer makes of images that are always the same is read from disk."""
        train = self.settings.train
        return data.build_feed(
            self.codes if self.reads_encoded else self.dataset.train,
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
            given = feed.chunk(0, 1), jnp.int32(1), self.for_training()
            jax.eval_shape(program.advance, program.abstract, *given)
        except (TypeError, ValueError, AttributeError) as error:
            reason = str(error).strip().split("\n")[0]
            raise UserError(f"this config cannot be trained ({type(error).__name__}: {reason[:200]}).") from error
        return program

    def augmented(self, batch: Batch, key: Array) -> Batch:
        """The batch as the config wants its training images, by the key of a step."""
        if self.settings.data.flip:
            batch = augment.flip(batch, key)
        return self.augmentation(batch, key) if self.augmentation else batch

    def for_training(self) -> dict[str, Tree]:
        """The `frozen` of the training step."""
        return self.frozen.as_weights() | self.perceptual()

    def perceptual(self) -> dict[str, Tree]:
        """What the losses find there beside a tokenizer: features of images, where they ask for some."""
        if self.family.frozen is None:
            return {}
        everywhere = NamedSharding(self.mesh, P())
        found = self.family.frozen(lambda: self.extractor.weights)
        return jax.tree.map(lambda x: tree.place(np.asarray(x), everywhere), found)

    def weights(self, state: TrainState) -> Weights:
        """What to sample with: those of the averaging profile that the config names, and the frozen ones."""
        return self.trainer.weights(state, self.settings.sample.ema) | self.frozen.as_weights()

    # ------------------------------------------------------------------------------------------ evaluation

    @functools.cached_property
    def extractor(self) -> features.Features:
        """The space in which images are judged; fitted to the training images once, then kept in the user's cache."""
        return features.build(self.dataset)

    def glance(self, weights: Weights) -> dict[str, float]:
        """Figures for the way: of a few samples with the config's own options, or of a tokenizer's reconstructions."""
        count = self.settings.evaluate.light_samples
        if self.family.tokenizer:
            return self.reconstruction(weights, count)
        rows = self.sampler.labels(count)
        images = self.sampler.draw(weights, self.settings.seed, rows, count, self.options)
        judged = self.judge_samples(images, rows.get("label"), light=True)
        return {name: row["value"] for name, row in judged["metrics"].items()}

    def grid(self, weights: Weights, count: int) -> np.ndarray:
        """Images u8[count,H,W,C] to look at, the classes in turn; of a tokenizer held-out ones, each beside its own."""
        if not self.family.tokenizer:
            return self.sampler.draw(weights, self.settings.seed, self.sampler.labels(count), count, self.options)
        images, made = self.reconstructed(weights, count // 2)
        return np.stack([images, made], axis=1).reshape(-1, *self.spec.shape)

    def evaluate(self, workdir: Path, weights: Weights, profile: str, step: int) -> dict[str, Any]:
        """What stands in evaluation.json: the judgement of samples with the config's own options, and what they cost.

        A tokenizer has no samples of its own: held-out images and their reconstructions are judged instead.

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
        if self.family.tokenizer:
            judged = {"reconstruction": self.reconstruction(weights, count)}
        else:
            judged = self.judge_samples(images, rows.get("label"))
        spent = {
            "parameters": cost.parameters(weights),
            "training": self.training_cost(workdir, step, weights),
            "sampling": self.sampling_cost(weights, self.options) | {"seconds": seconds},
            "device": jax.devices()[0].device_kind,
            "devices": jax.device_count(),
        }
        return {"step": step, "ema": profile} | judged | {"cost": spent}

    def training_cost(self, workdir: Path, step: int, weights: Weights) -> dict[str, Any]:
        """Images, FLOPs and seconds of the first `step` steps; seconds are None for runs that did not keep them."""
        size = self.settings.train.batch_size
        state = jax.eval_shape(self.trainer.init)
        batch = cost.batch_like(self.family, self.spec, size, self.reads_encoded)
        frozen = {name: of for name, of in weights.items() if name not in state.params} | self.perceptual()
        flops = cost.training_flops(self.family, self.trainer.update, state, batch, frozen, step)
        seconds = logbook.seconds_until(workdir / "metrics.jsonl", step)
        return {
            "steps": step,
            "images": step * size,
            "flops": flops,
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
        rule = f"{name} has no likelihood" + (" of images over a tokenizer, which loses some" if self.tokenizer else "")
        require(not likelihood or self.family.nll is not None, "--likelihood", likelihood, rule)
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
        return likelihood.summarise(bits) | {"dequantised": self.family.dequantised, "bound": self.family.bound}

    def reconstruction(self, weights: Weights, count: int) -> dict[str, Any]:
        """How near `count` held-out images come to themselves, to the latent and back: see `reconstruction.judge`.

        Where they become codes on the way, also how these are used: see `codes_in_use`.
        """
        judged = reconstruction.judge(*self.reconstructed(weights, count), self.extractor)
        return judged | (self.codes_in_use(weights, count) if self.family.tokenizer else {})

    def codes_in_use(self, weights: Weights, count: int) -> dict[str, Any]:
        """`codes`, how many there are, and `codebooks.metrics` of those that `count` held-out images become.

        Nothing where they become latents.
        """
        it = self.family.tokenizer
        if not it.vocabulary:
            return {}
        rows = {"image": self.held_out(count)["image"]}
        act = lambda weights, keys, rows, options: it.encode(weights[it.player], rows["image"], None)
        reader = Sampler(act, self.spec, self.mesh, self.settings.sample.batch_size)
        tokens = np.concatenate(list(reader.batches(weights, 0, rows, len(rows["image"]), ())))
        usage = codebooks.counted(codebooks.begin(it.vocabulary), jnp.int32(0), jnp.asarray(tokens))
        return {"codes": it.vocabulary} | {name: float(value) for name, value in codebooks.metrics(usage).items()}

    def reconstructed(self, weights: Weights, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(`count` held-out images, their reconstructions), u8[N,H,W,C] each."""
        rows = self.held_out(count)
        options = self.family.sampling({**self.settings.sampling, **drawing.of_encoded(self.config)})
        act = functools.partial(latents.reconstruct, self.family.latent)
        back = Sampler(act, self.spec, self.mesh, self.settings.sample.batch_size)
        made = back.draw(weights, self.settings.seed, rows, len(rows["index"]), options)
        return to_uint8(rows["image"], self.spec.levels), made

    def held_out(self, count: int) -> dict[str, np.ndarray]:
        """`image`, `index` and, of data with classes, `label` of `count` held-out images (all, if there are fewer)."""
        chosen = real.choose(self.dataset.held_out, count)
        rows = {"image": to_float(chosen.image), "index": np.arange(len(chosen), dtype=np.int32)}
        return rows if chosen.label is None else rows | {"label": chosen.label.astype(np.int32)}

    def judge_samples(self, images: np.ndarray, labels: np.ndarray | None, light: bool = False) -> dict[str, Any]:
        """Judge images uint8 [N,H,W,C] against held-out images."""
        report.check(images, labels, self.dataset)
        return report.judge(images, labels, self.dataset, self.extractor, self.settings.evaluate, light=light)


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


def open_run(workdir: str) -> Run:
    """The run of a workdir with its data, on the devices that are here, however many it was trained on.

    Raises:
      UserError: where there is no readable config.
    """
    return assemble(config_of(workdir), training=False)
