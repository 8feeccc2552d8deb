"""The table: every family in a few variants, built small, and what its promises are tested with.

A family joins by being registered in `families.FAMILIES` and by rows of `VARIANTS`, which say how to build it small.
Then `test_families.py` and `test_family_*.py` hold it to what the trainer, the sampler and the evaluation rely on. They
do not know which family they look at. Where each of the contract's five points is tested:

1. A step, compiled once; each player moved by its own loss alone; all state saved, and taken up again bit by bit:
   `test_family_training.py`. Real processes, killed at any moment: `tests/training/test_resume.py`.
2. 1 and 8 devices, bfloat16, microbatches, averages: `test_family_training.py`; the trainer alone: `tests/training`.
3. An image is that of its seed and index, in [-1, 1]: `test_family_sampling.py`.
4. Bits per dimension, and bounds in order above a known entropy: `test_family_likelihood.py`.
5. Truths of a family: of the GAN's losses, penalties, spectral norm and augmentation `tests/adversarial`; of the VAE's
   Gaussians, pixels and bounds `tests/variational`, and of probabilistic PCA `tests/families/test_vae.py`; StyleGAN2's
   convolution `tests/networks/test_stylegan2.py`; of diffusion `test_solvers.py`, `test_stochastic.py` and
   `tests/diffusion`; of tokens and tokenizers `tests/tokenizers`; of each family as a whole `tests/families`.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import families
from diffusion_jax.sampling import Sampler
from diffusion_jax.tokenizers import autoencoder
from diffusion_jax.types import ImageSpec
from tests.arrays import filled
from tests.training.toys import mesh

LABELLED = ImageSpec(size=8, channels=1, num_classes=3, levels=4)
PLAIN = ImageSpec(size=8, channels=1, num_classes=0, levels=4)
CODEC = "maskgit(channels=8,multipliers=(1,1),blocks=1)"
"""Of a tokenizer: 4x4 places an image."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A row: how to build a family small, and which of its options to look at.

    Attributes:
      section: the config's `family`.
      spec: what its images look like.
      options: option of `sample` -> two values; both count, and from one to the other nothing compiles again. The first
        ones make images in little time.
      needs: option of `sample` -> the value that it needs.
      bounds: rows of `family.likelihood`, from the loosest bound to the tightest; none without a likelihood.
      exact: whether there is one likelihood, and nothing random in it.
      settled: player -> the paths of those of its parameters that follow no loss.
      worse: the variant that it is guided away from; then it is sampled from and not trained.
      codec: the bottleneck of the frozen tokenizer that it is over; empty for none.
    """

    section: Mapping[str, object]
    spec: ImageSpec = LABELLED
    options: Mapping[str, tuple] = field(default_factory=dict)
    needs: Mapping[str, object] = field(default_factory=dict)
    bounds: tuple[str, ...] = ()
    exact: bool = False
    settled: Mapping[str, set[str]] = field(default_factory=dict)
    worse: str | None = None
    codec: str = ""

    def build(self, precision="float32", **fields):
        """The family, with other `fields` of its section where they are given."""
        given = (self.autoencoder(precision).tokenizer("autoencoder"),) if self.codec else ()
        return families.build({**self.section, **fields}, self.spec, precision, *given)

    def autoencoder(self, precision="float32"):
        """Encoder, `codec` and decoder."""
        return autoencoder.build(CODEC, self.codec, self.spec, precision)

    def over(self, codec, **fields):
        """The same over a frozen tokenizer, with other `fields`. Its latents have no range that a threshold knows."""
        section = {**self.section, "tokenizer": "workdir:codec", **fields}
        options = {name: pair for name, pair in self.options.items() if name != "threshold"}
        needs = {"threshold": "none"} if options != self.options else {}
        return replace(self, section=section, options=options, needs=needs, codec=codec, bounds=(), exact=False)


# ------------------------------------------------------------------------------------------ diffusion

DIT = "dit(patch=4,width=16,depth=1,heads=2)"
UNET = "unet(channels=32,multipliers=(1,),blocks=1,attention=())"

WALK = {
    "solver": ("ddim(eta=0.2)", "ddim(eta=1.0)"),
    "grid": ("uniform", "cosine"),
    "steps": (3, 6),
    "threshold": ("static", "static(bound=0.3)"),
    "temperature": (1.0, 1.5),
}
GUIDANCE = {
    "guidance": (1.5, 3.0),
    "rules": ("interval(high=90.0)+rescaled(phi=0.1)", "interval(high=0.7)+rescaled(phi=0.9)"),
}
AUTOGUIDANCE = {
    "autoguidance": (1.5, 3.0),
    "autoguidance_rules": ("apg(momentum=-0.5)", "apg(momentum=-0.1)"),
}


def diffusion(
    schedule, prediction, spec=LABELLED, network=DIT, options=None, worse=None, bound="bound(draws=8)", **fields
):
    section = {"name": "diffusion", "network": network, "schedule": schedule, "prediction": prediction, **fields}
    options = WALK | (GUIDANCE if spec.num_classes else {}) | (options or {})
    bounds = (bound,) if "tokenizer" not in fields else ()
    return Variant(section=section, spec=spec, options=options, bounds=bounds, worse=worse)


DIFFUSION = {
    "diffusion": diffusion("rectified_flow", "velocity"),
    "diffusion-plain": diffusion(
        "cosine",
        "v",
        PLAIN,
        DIT[:-1] + ",dropout=0.2)",
        weighting="min_snr",
        time_sampling="uniform",
        bound="flow(steps=4)",
    ),
    "diffusion-edm": diffusion("edm", "edm", weighting="edm", time_sampling="log_normal"),
    "diffusion-patches": diffusion("cosine", "v", tokenizer="patches(size=2)"),
    "diffusion-patches-unet": diffusion("cosine", "v", network=UNET, tokenizer="patches(size=2)"),
    "diffusion-unet": diffusion("vp_linear", "v", network=UNET),
    "diffusion-learned": diffusion(
        "learned(hidden=8)", "v", weighting="elbo", time_sampling="uniform", quantiles="importance(bins=4,memory=1)"
    ),
    "diffusion-variance": diffusion("cosine", "v", objective="learned_variance(steps=20)", time_sampling="uniform"),
    "diffusion-classifier": diffusion("gvp", "v", classifier=DIT, options={"classifier": (0.0, 2.0)}),
    "diffusion-autoguided": diffusion(
        "rectified_flow", "x0", network=DIT.replace("width=16", "width=24"), options=AUTOGUIDANCE, worse="diffusion"
    ),
}
"""The last one is guided by another network of another prediction."""


# ------------------------------------------------------------------------------------------ GAN

R3GAN = "r3gan(channels_base=64,channels_max=8,blocks=1,group=16)"
STYLEGAN2 = "stylegan2(mapping_layers=1,channels_base=32,channels_max=4,{})"
NORMAL = ("normal(bound=2.0)", "normal(bound=0.5)")


def gan(generator, discriminator, spec=LABELLED, truncation=NORMAL, **fields):
    section = {"name": "gan", "generator": generator, "discriminator": discriminator, **fields}
    return Variant(section=section, spec=spec, options={"truncation": truncation})


GAN = {
    "gan": gan(R3GAN, R3GAN),
    "gan-plain": gan(
        "dcgan(width=8)", "dcgan(width=8)", PLAIN, loss="non_saturating", regularisers="", generator_every=2
    ),
    "gan-ada": gan(
        "resnet(width=8,multipliers=(1,))",
        "resnet(width=8,multipliers=(1,),blocks=0)",
        loss="least_squares",
        regularisers="gradient_penalty",
        spectral_norm="both",
        augmentation="ada(start=0.5,geometry=False,color=False)",
    ),
    "gan-stylegan2": gan(
        STYLEGAN2.format("latent=4,style=4"),
        STYLEGAN2.format("group=2"),
        truncation=("style(psi=0.9)", "style(psi=0.3)"),
        loss="non_saturating",
        regularisers="r1(every=2)",
        augmentation="diffaugment(policy='translation,cutout')",
    ),
    "gan-hinge": gan(
        "dcgan(width=8)", R3GAN, loss="hinge", regularisers="gradient_penalty(every=2)", discriminator_rate=2.0
    ),
    "gan-wasserstein": gan("dcgan(width=8)", R3GAN, loss="wasserstein", regularisers="gradient_penalty"),
}


# ------------------------------------------------------------------------------------------ VAE

FLAT = "flat(latents=4,channels=8,multipliers=(1,))"
LADDER = "ladder(channels=8,multipliers=(1,1),levels=(1,1),latents=2)"


def vae(network, spec=LABELLED, **fields):
    options = {"temperature": (1.0, 1.5), "show": ("draw", "mean")}
    bounds = ("elbo(draws=8)", "importance(draws=32)")
    section = {"name": "vae", "network": network, **fields}
    return Variant(section=section, spec=spec, options=options, bounds=bounds)


VAE = {
    "vae": vae(LADDER, free_bits=0.5),
    "vae-flat": vae(FLAT, pixels="gaussian(std=0.5,learned=True)"),
    "vae-plain": vae(FLAT, PLAIN, pixels="bernoulli", beta=2.0, warmup=2),
}


# ------------------------------------------------------------------------------------------ transformer

DRAWS = {"guidance": (1.5, 3.0), "temperature": (1.0, 0.3), "top_k": (0, 2), "top_p": (1.0, 0.4)}


def transformer(network, spec=LABELLED, options=None, **fields):
    options = {key: pair for key, pair in DRAWS.items() if spec.num_classes or key != "guidance"} | (options or {})
    section = {"name": "transformer", "network": network, **fields}
    exact = fields.get("decoding", "autoregressive") in ("autoregressive", "var")
    return Variant(section=section, spec=spec, options=options, exact=exact)


TRANSFORMER = {
    "transformer": transformer("gpt(width=16,depth=1,heads=2,multiple_of=1)"),
    "transformer-plain": transformer("gpt(width=16,depth=2,heads=2,multiple_of=8,scan=True,dropout=0.2)", PLAIN),
    "transformer-maskgit": transformer(
        "maskgit(width=16,depth=1,heads=2,dropout=0.1)",
        decoding="maskgit",
        label_smoothing=0.1,
        options={"steps": (4, 9), "choice_temperature": (4.5, 0.5)},
    ),
    "transformer-var": transformer(
        "var(width=16,depth=1,heads=2,dropout=0.1)",
        decoding="var",
        tokenizer="pyramid",
        options={"guidance_schedule": ("linear", "constant")},
    ),
    "transformer-mar": Variant(
        section={
            "name": "transformer",
            "network": "mar(width=16,depth=1,heads=2,buffer=2,mlp_width=16,mlp_depth=1,dropout=0.1)",
            "decoding": "mar",
            "tokenizer": "patches",
        },
        options={
            "guidance": (1.5, 3.0),
            "guidance_schedule": ("linear", "constant"),
            "temperature": (1.0, 0.3),
            "steps": (3, 6),
            "solver": ("ddim(eta=0.2)", "ddim(eta=1.0)"),
            "grid": ("uniform", "cosine"),
            "solver_steps": (3, 6),
        },
    ),
}


# ------------------------------------------------------------------------------------------ tokenizer

PATCHGAN = "patchgan(channels=4,halvings=1)"


def tokenizer(network, bottleneck, settled=(), **fields):
    """Of images without labels, at which it does not look."""
    section = {"name": "tokenizer", "network": network, "bottleneck": bottleneck, **fields}
    return Variant(section=section, spec=PLAIN, settled={"autoencoder": set(settled)})


TOKENIZER = {
    "tokenizer": tokenizer(
        "vqgan(channels=8,multipliers=(1,1),blocks=1)",
        "vq(codes=4,latents=2)",
        discriminator=PATCHGAN,
        loss="least_squares",  # the hinge loss moves no last bias while all logits lie within it
    ),
    "tokenizer-residual": tokenizer(
        "vqgan(channels=8,multipliers=(1,1),blocks=1)", "residual(codes=4,latents=2,scales=(1,2,4))"
    ),
    "tokenizer-fsq": tokenizer(CODEC, "fsq(levels=(5,4))"),
    "tokenizer-kl": tokenizer(CODEC, "kl(latents=2)", error="l2"),
    "tokenizer-lfq": tokenizer(
        "maskgit(channels=8,multipliers=(1,2),blocks=1)",
        "lfq(bits=3)",
        discriminator=PATCHGAN,
        loss="non_saturating",
        balance="fixed(weight=0.5)",
    ),
    "tokenizer-ema": tokenizer(
        CODEC,
        "vq(codes=4,latents=2,codebook='ema',revive=0.1)",
        settled=["codebook"],
        discriminator=PATCHGAN,
        loss="least_squares",
        discriminator_start=1,  # at rest before
    ),
}


# ------------------------------------------------------------------------------------------ over frozen tokenizers

SECOND = {
    "diffusion-latent": DIFFUSION["diffusion"].over("kl(latents=2)", network="dit(patch=1,width=16,depth=1,heads=2)"),
    "diffusion-latent-unet": DIFFUSION["diffusion"].over("kl(latents=2)", network=UNET),
    "transformer-codes": TRANSFORMER["transformer"].over("fsq(levels=(5,4))"),
    "transformer-maskgit-codes": TRANSFORMER["transformer-maskgit"].over("lfq(bits=3)"),
    "transformer-var-codes": TRANSFORMER["transformer-var"].over("residual(codes=6,latents=3,scales=(1,2,4))"),
    "transformer-mar-latents": TRANSFORMER["transformer-mar"].over("kl(latents=2)"),
}


# ------------------------------------------------------------------------------------------ all of them

VARIANTS = DIFFUSION | GAN | VAE | TRANSFORMER | TOKENIZER | SECOND
TRAINED = [name for name, row in VARIANTS.items() if row.worse is None]
"""The variants that are trained: one that is guided away from another takes its weights from trained ones."""

SMALLEST = ("diffusion", "gan-plain", "vae-plain", "transformer", "tokenizer-kl")
"""Of each family the variant that compiles fastest."""


def smallest(names, *others):
    """`names` for `parametrize`: by default only the smallest of each family and `others`, all of them with -m slow."""
    usual = {*SMALLEST, *others}
    return [pytest.param(name, marks=[] if name in usual else pytest.mark.slow) for name in names]


@functools.cache
def family(name, precision="float32", **fields):
    """The variant, built once; `fields` as of `Variant.build`."""
    row = VARIANTS[name]
    it = row.build(precision, **fields)
    return it.guided_by(family(row.worse).denoise) if row.worse else it


def noise(spec, count, seed=0):
    """Images f32[count,H,W,C] whose grey levels are drawn alike: log2(levels) bits of entropy a dimension."""
    grey = np.random.default_rng(seed).integers(spec.levels, size=(count, *spec.shape))
    return (2.0 * grey / (spec.levels - 1) - 1.0).astype(np.float32)


def batch(spec, count=4, seed=0):
    """A batch of such images, with the classes in turn."""
    label = {"label": jnp.arange(count, dtype=jnp.int32) % spec.num_classes} if spec.num_classes else {}
    return {"image": jnp.asarray(noise(spec, count, seed)), "index": jnp.arange(count, dtype=jnp.int32)} | label


@functools.cache
def weights(name):
    """Parameters drawn at random, so that none is 0: at initialisation many outputs are 0."""
    worse = VARIANTS[name].worse
    return filled(lambda key: family(name).init(key)[0]) | frozen(name) | ({"weak": weights(worse)} if worse else {})


@functools.cache
def frozen(name):
    """What a tokenizer gives a training step and the weights: parameters, and the scale of latents."""
    if not VARIANTS[name].codec:
        return {}
    it = VARIANTS[name].autoencoder()
    given = {"params": filled(lambda key: it.init(key)[0])}
    if family(name).first_stage.measured:
        channels = it.bottleneck.latents
        given |= {"shift": np.full(channels, 0.1, np.float32), "scale": np.full(channels, 2.0, np.float32)}
    return {"tokenizer": given}


# ------------------------------------------------------------------------------------------ sampling


@functools.cache
def sampler(name, ways=1, batch_size=4):
    """The variant's sampler over `ways` devices."""
    return Sampler(family(name).generate, VARIANTS[name].spec, mesh(ways), batch_size)


def options(name, **changes):
    """The first ones of the variant's options, but for `changes`, as `generate` takes them."""
    firsts = {option: values[0] for option, values in VARIANTS[name].options.items()}
    return family(name).sampling({**VARIANTS[name].needs, **firsts, **changes})


def drawn(name, index=(0, 1, 2, 3), seed=0, label=None, params=None, **changes):
    """The images f32[4,H,W,C] of (seed, index), by one batch of the sampler's program.

    Of the classes in turn, or of `label`; with `weights`, or with `params`.
    """
    it, classes, index = sampler(name), VARIANTS[name].spec.num_classes, np.array(index, np.int32)
    wanted = index % max(classes, 1) if label is None else np.broadcast_to(np.int32(label), index.shape)
    rows = {"label": it.put(wanted)} if classes else {}
    params = weights(name) if params is None else params
    return np.asarray(it.program(params, np.uint32(seed), it.put(index), rows, options(name, **changes)))
