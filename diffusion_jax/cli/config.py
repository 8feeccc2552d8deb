"""What a config file starts from."""

from collections.abc import Callable, Mapping

from ml_collections import ConfigDict

from diffusion_jax import plugs, settings
from diffusion_jax.errors import UserError


def base(file: str, family: str, families: Mapping[str, Callable[[ConfigDict], None]]) -> ConfigDict:
    """Every field at its default, then what `families[family]` changes.

    Args:
      file: the config file, for error messages.
      family: the argument after the colon of --config.
      families: name -> function that fills in what is particular to that family. What follows a dash in a name tells
        configs of one family apart: `transformer-maskgit` starts from the defaults of the family `transformer`.

    Raises:
      UserError: for an unknown family, or none: the sentence lists them.
    """
    known = ", ".join(sorted(families))
    if not family:
        raise UserError(f"--config={file} needs a family after a colon: one of {known}.")
    if family not in families:
        raise UserError(f"--config={file}:{family}: there is no such family here; {plugs.suggest(family, families)}.")
    from diffusion_jax.families import default_fields  # jax takes a second to import

    fields = settings.common_fields()
    fields["family"], own = default_fields(family.partition("-")[0])
    fields["sample"].update(own)
    config = ConfigDict(fields)
    families[family](config)
    return config
