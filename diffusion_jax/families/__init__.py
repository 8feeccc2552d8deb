"""Families put a network, an objective and a sampler together. One registry: name -> (settings, builder)."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from diffusion_jax import plugs
from diffusion_jax.errors import UserError
from diffusion_jax.families import diffusion, gan, tokenizer, transformer, vae
from diffusion_jax.settings import from_section
from diffusion_jax.tokenizers import Tokenizer
from diffusion_jax.types import Family, ImageSpec

FAMILIES = {"diffusion": diffusion, "gan": gan, "tokenizer": tokenizer, "transformer": transformer, "vae": vae}
"""A family is a module with `FamilySettings`, `SampleSettings` (dataclasses) and `build(settings, spec, precision)`."""


def build(section: Mapping[str, Any], spec: ImageSpec, precision: str, tokenizer: Tokenizer | None = None) -> Family:
    """The family that the config's `family` section describes, for images of `spec`.

    `tokenizer` is the one that its `tokenizer` names, where that is a trained one.

    Raises:
      UserError: for an unknown name or field, or a value that the family refuses.
    """
    name = section.get("name", "")
    if name not in FAMILIES:
        raise UserError(f"family.name = {name!r}: there is no such family; {plugs.suggest(str(name), FAMILIES)}.")
    module = FAMILIES[name]
    own = {key: value for key, value in section.items() if key != "name"}
    given = {"tokenizer": tokenizer} if tokenizer else {}
    return module.build(from_section(module.FamilySettings, own, "family"), spec, precision, **given)


def default_fields(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The family's sections `family` and `sample` at their defaults, for a config file to start from."""
    module = FAMILIES[name]
    return {"name": name} | asdict(module.FamilySettings()), asdict(module.SampleSettings())
