"""configs/images.py: what each family starts from can be built, by its shapes alone."""

from pathlib import Path

import jax
import pytest

from diffusion_jax.cli import arguments
from diffusion_jax.cli.model import assemble_model
from diffusion_jax.errors import UserError
from diffusion_jax.training.step import Trainer
from diffusion_jax.types import ImageSpec

CONFIG = Path(__file__).parents[2] / "configs" / "images.py"
SPEC = ImageSpec(size=64, channels=3, num_classes=10)
PLAIN = ImageSpec(size=64, channels=3, num_classes=0)


def config_of(family, *flags):
    argv = [f"--config={CONFIG}:{family}", *flags]
    return arguments.config_of(arguments.parse("train", arguments.define_config, argv))


@pytest.mark.parametrize("spec", [SPEC, PLAIN], ids=["classes", "plain"])
@pytest.mark.parametrize("family", ["diffusion", "gan", "tokenizer", "vae"])
def test_each_family_is_built_for_images_of_64_pixels(family, spec):
    model = assemble_model(config_of(family), spec)
    state = jax.eval_shape(Trainer(model.family, model.settings.train, 0).init)
    assert set(state.params) == {player.name for player in model.family.players}
    images = jax.eval_shape(model.family.generate, state.ema["main"], *inputs(spec), model.options)
    assert images.shape == (2, *spec.shape)


def inputs(spec):
    """Keys, and labels where there are classes, as shapes."""
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 2))
    return keys, {"label": jax.ShapeDtypeStruct((2,), "int32")} if spec.num_classes else {}


def test_the_transformer_asks_for_its_tokenizer(tmp_path):
    """Which is to be trained first; the network itself is built over pixels here."""
    with pytest.raises(UserError, match="tokenizer"):
        assemble_model(config_of("transformer", f"--config.family.tokenizer=workdir:{tmp_path}"), SPEC)
    small = ImageSpec(size=8, channels=3, num_classes=10)
    model = assemble_model(config_of("transformer", "--config.family.tokenizer=pixels"), small)
    state = jax.eval_shape(Trainer(model.family, model.settings.train, 0).init)
    images = jax.eval_shape(model.family.generate, state.ema["main"], *inputs(small), model.options)
    assert images.shape == (2, 8, 8, 3)
