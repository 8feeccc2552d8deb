"""Costs against what is counted by hand."""

import jax
import jax.numpy as jnp
import pytest

from diffusion_jax import families
from diffusion_jax.evaluation import cost
from diffusion_jax.settings import TrainSettings
from diffusion_jax.training.step import Trainer
from diffusion_jax.types import Aux, Family, ImageSpec, Player

pytestmark = pytest.mark.usefixtures("quick_compilation")

SPEC = ImageSpec(size=4, channels=1, num_classes=0)
BATCH = 8
WIDTHS = (16, 32, 5)
"""Of the dense toy, which begins with the image's 16 pixels."""
FORWARD = 2 * (16 * 32 + 32 * 5)
"""FLOPs of its forward pass, an image."""


def dense(every=1, start=0) -> Family:
    """Two players with the same network and loss; the second moves in each `every`-th step."""

    def network(params, x):
        return jnp.tanh(x.reshape(len(x), -1) @ params["first"]) @ params["second"]

    def loss(name):
        def of(params, ctx):
            return jnp.mean(network(params[name], ctx.batch["image"]) ** 2), Aux(metrics={}, extra=ctx.extra)

        return of

    def init(key):
        own = {"first": jnp.zeros(WIDTHS[:2]), "second": jnp.zeros(WIDTHS[1:])}
        return {"always": own, "sometimes": own}, {}

    def generate(weights, keys, condition, options):
        return network(weights["always"], jnp.ones((len(keys), *SPEC.shape)))

    return Family(
        name="dense",
        players=(
            Player(name="always", loss=loss("always")),
            Player(name="sometimes", loss=loss("sometimes"), every=every, start=start),
        ),
        init=init,
        generate=generate,
        sampling=lambda section: None,
    )


def training_flops(family, steps=1, **settings):
    trainer = Trainer(family, TrainSettings(batch_size=BATCH, optimizer="sgd", clip_norm=0.0, **settings), seed=0)
    batch = cost.batch_like(family, SPEC, BATCH)
    return cost.training_flops(family, trainer.update, jax.eval_shape(trainer.init), batch, {}, steps)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_step_takes_three_forward_passes_less_the_images_gradient(accumulate):
    """Of each layer one product forward, one towards its weights, one towards its input: not for the images."""
    by_hand = BATCH * (3 * FORWARD - 2 * 16 * 32)
    # The squares of the loss and what SGD adds are not products of matrices: a number here and there.
    assert training_flops(dense(), accumulate=accumulate) == pytest.approx(2 * by_hand, rel=0.02)


def test_a_player_counts_in_the_steps_that_are_its_own():
    one = training_flops(dense())
    assert training_flops(dense(every=4)) == pytest.approx(one * (1 + 1 / 4) / 2)
    assert training_flops(dense(start=30), steps=40) == pytest.approx(one * (40 + 10) / 2)
    assert training_flops(dense(start=50), steps=40) == pytest.approx(one * 40 / 2)


def test_a_sample_of_a_family_without_a_loop_is_one_forward_pass():
    family = dense()
    weights = jax.eval_shape(family.init, jax.random.key(0))[0]
    assert cost.evaluations(family, SPEC, weights, None) == 1
    assert cost.sampling_flops(family, SPEC, weights, None, 10, 1) == FORWARD


def test_parameters_are_those_of_all_players():
    weights, _ = dense().init(None)
    own = 16 * 32 + 32 * 5
    assert cost.parameters(weights) == {"total": 2 * own, "players": {"always": own, "sometimes": own}}


LABELLED = ImageSpec(size=8, channels=1, num_classes=3)


@pytest.fixture(scope="module")
def model():
    """A diffusion model with EDM's schedule, and its weights."""
    section = {"name": "diffusion", "network": "dit(patch=4,width=16,depth=1,heads=2)", "schedule": "edm"}
    section |= {"prediction": "edm", "weighting": "edm", "time_sampling": "log_normal"}
    family = families.build(section, LABELLED, "float32")
    return family, jax.jit(family.init)(jax.random.key(0))[0]


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"solver": "heun", "grid": "karras", "steps": 18}, 35),  # Karras et al. 2022, table 2: NFE 35 on CIFAR-10
        ({"solver": "heun", "grid": "karras", "steps": 18, "guidance": 2.0}, 70),
        ({"solver": "ddim", "grid": "karras", "steps": 10}, 10),
        # Sigma falls from 80 to 0.002, all of it above 1e-6 and below 1e6: always alone, and never.
        ({"solver": "ddim", "grid": "karras", "steps": 10, "guidance": 2.0, "rules": "interval(high=1e-6)"}, 10),
        ({"solver": "ddim", "grid": "karras", "steps": 10, "guidance": 2.0, "rules": "interval(high=1e6)"}, 20),
    ],
)
def test_evaluations_are_counted_as_they_happen(model, section, expected):
    family, weights = model
    assert cost.evaluations(family, LABELLED, weights, family.sampling(section)) == expected


def test_an_adaptive_solver_is_counted_too(model):
    """Dormand and Prince's pair: six evaluations for each part of a step, and one more a step."""
    family, weights = model
    asked = cost.evaluations(family, LABELLED, weights, family.sampling({"solver": "rk45", "steps": 4}))
    assert asked >= 4 * 7
    assert (asked - 4) % 6 == 0


def test_a_sample_takes_the_networks_flops_at_each_evaluation(model):
    """A DiT's products by hand: patch embedding, time and label, one block, the last layer; T = 4 tokens."""
    family, weights = model
    tokens, d, pixels = 4, 16, 16
    attention = tokens * 4 * d * d + 2 * tokens * tokens * d
    mlp = 2 * tokens * d * 4 * d
    ends = tokens * (pixels * d + d * pixels)
    time = 256 * d + d * d
    modulation = 6 * d * d + 2 * d * d
    elementwise = 5 * tokens * d  # two shifts and scales, two gates, the last layer's shift and scale
    by_hand = attention + mlp + ends + time + modulation + elementwise
    found = cost.sampling_flops(family, LABELLED, weights, family.sampling({}), 10, 7)
    assert found == pytest.approx(7 * 2 * by_hand, rel=0.02)
