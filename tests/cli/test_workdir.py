"""Which configs may go on in a workdir."""

import json

import pytest

from diffusion_jax.cli.config import base
from diffusion_jax.cli.workdir import check_config, completed, differences, plain, saved_config
from diffusion_jax.errors import UserError


@pytest.fixture
def config():
    return plain(base("here", "diffusion", {"diffusion": lambda config: None}).to_dict())


@pytest.fixture
def begun(config, tmp_path):
    """A workdir that was begun with `config`, before the field `family.weighting` existed."""
    old = json.loads(json.dumps(config))
    del old["family"]["weighting"]
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    (tmp_path / "config.json").write_text(json.dumps(old))
    return tmp_path


def test_a_field_that_is_new_contradicts_nothing_at_its_default(begun, config):
    check_config(begun, config, override=False)
    assert differences(saved_config(begun), config) == ["family.weighting is 'simple', was None"]
    assert differences(completed(saved_config(begun)), config) == []


@pytest.mark.parametrize("change", [{"weighting": "snr"}, {"network": "unet"}])
def test_every_other_difference_is_named(begun, config, change):
    config["family"] |= change
    with pytest.raises(UserError, match=rf"family\.{next(iter(change))}.*--override"):
        check_config(begun, config, override=False)
    check_config(begun, config, override=True)
