"""Networks: arrays in, arrays out. The only room that imports flax modules; everyone else sees pure init and apply."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax import plugs
from diffusion_jax.errors import require
from diffusion_jax.networks import adm, classifier, ddpmpp, dit, edm2, presets, unet, uvit, vdm
from diffusion_jax.types import Array, ImageSpec, Tree

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class Prepared(NamedTuple):
    """Parameters, and beside them the weights that layers make of them, in the form in which they are used."""

    params: Tree
    ready: Tree


@dataclass(frozen=True, kw_only=True)
class Network:
    """A pure pair.

    Attributes:
      init: key -> parameters, float32.
      prepare: parameters -> what `apply` takes in their place, so that a loop does not cast or normalise weights in
        each step. The compiler would not see to it: it moves nothing out of a branch.
      apply: (params, x f32[B,H,W,C], time f32[B] or f32[1], label i32[B] or None, keys key[B] or None,
        augment f32[B,width] or None) -> f32[B,H,W,channels_out]. `label` = num_classes stands for "no label"; `keys`
        switch dropout on; `augment` says what was done to the image, nothing where None.
      fixed: how many numbers of fixed tables a published count of parameters includes.
      augment: width of the augmentation's label; 0 for a network that takes none.
      log_variance: (params, time f32[B]) -> f32[B], the head that learns how uncertain the loss at a time is; None
        where there is none.
      project: parameters -> parameters, applied after each update; None where updates stand as they are.
    """

    init: Callable[[Array], Tree]
    apply: Callable[..., Array]
    prepare: Callable[[Tree], Tree] = lambda params: params
    fixed: int = 0
    augment: int = 0
    log_variance: Callable[[Tree, Array], Array] | None = None
    project: Callable[[Tree], Tree] | None = None


BACKBONES = {
    "adm": (adm.ADMOptions, adm.ADM, adm.size_error),
    "ddpmpp": (ddpmpp.DDPMPPOptions, ddpmpp.DDPMPP, unet.size_error),
    "dit": (dit.DiTOptions, dit.DiT, dit.size_error),
    "edm2": (edm2.EDM2Options, edm2.EDM2, unet.size_error),
    "unet": (unet.UNetOptions, unet.UNet, unet.size_error),
    "uvit": (uvit.UViTOptions, uvit.UViT, uvit.size_error),
    "vdm": (vdm.VDMOptions, vdm.VDM, vdm.any_size),
}
"""name -> (options, module, what is wrong with an image size).

A module may have three functions more: `fixed` (options, image spec), `log_variance` and `project`, as in `Network`.
"""


def build(
    field: str, text: str, spec: ImageSpec, precision: str = "float32", channels_out: int | None = None
) -> Network:
    """The denoising network that `text` names, for images of `spec`.

    Args:
      field: the config field, for error messages.
      text: such as `"dit(width=128,depth=6)"` or `"dit-s/2"`.
      spec: size, channels and classes of the images.
      precision: "float32" or "bfloat16", the arithmetic's; parameters are float32.
      channels_out: of the prediction; the image's own where None.

    Raises:
      UserError: for an unknown name or option, or sizes that do not fit `spec`.
    """
    name, given = presets.expand(field, text)
    known = {**BACKBONES, **presets.PRESETS}
    require(name in BACKBONES, field, text, f"there is no {name!r}; {plugs.suggest(name, known)}")
    options_of, module, misfit = BACKBONES[name]
    options = plugs.call(field, options_of, given, label=name)
    problem = misfit(options, spec.size)
    require(not problem, field, text, problem)
    model = module(options, channels_out or spec.channels, spec.num_classes, DTYPES[precision])

    label = jnp.zeros((1,), jnp.int32) if spec.num_classes else None
    example = (jnp.zeros((1, *spec.shape)), jnp.zeros((1,)), label, None)

    def init(key: Array) -> Tree:
        return model.init(key, *example)["params"]

    width = getattr(options, "augment", 0)

    def apply(
        params: Tree,
        x: Array,
        time: Array,
        label: Array | None,
        keys: Array | None = None,
        augment: Array | None = None,
    ) -> Array:
        given = (x, time, label, keys, augment) if width else (x, time, label, keys)
        weights = params._asdict() if isinstance(params, Prepared) else {"params": params}
        return model.apply(weights, *given).astype(jnp.float32)

    def prepare(params: Tree) -> Prepared:
        """By a forward pass whose result nobody asks for, so that it is not computed: see `layers.ready`."""
        _, made = model.apply({"params": params}, *example, mutable=["ready"])
        return Prepared(params=params, ready=made.get("ready", {}))

    return Network(
        init=init,
        prepare=prepare,
        apply=jax.named_call(apply, name=name),
        augment=width,
        fixed=module.fixed(options, spec) if hasattr(module, "fixed") else 0,
        log_variance=module.log_variance if getattr(options, "log_variance", 0) else None,
        project=getattr(module, "project", None),
    )


def build_classifier(spec: ImageSpec, features: int) -> Network:
    """A small classifier of images of `spec`, which has at least 2 classes.

    Its `apply` is (params, x f32[B,H,W,C]) -> (logits f32[B,num_classes], last hidden layer f32[B,features]).
    """
    model = classifier.Classifier(spec.num_classes, classifier.stage_widths(spec.size), features)

    def init(key: Array) -> Tree:
        return model.init(key, jnp.zeros((1, *spec.shape)))["params"]

    def apply(params: Tree, x: Array) -> tuple[Array, Array]:
        return model.apply({"params": params}, x)

    return Network(init=init, apply=jax.named_call(apply, name="classifier"))
