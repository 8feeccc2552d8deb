"""One device and eight agree; what is large is cut; what cannot be cut is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from diffusion_jax.errors import UserError
from diffusion_jax.settings import MeshSettings
from diffusion_jax.training import sharding
from tests.training import toys

pytestmark = pytest.mark.usefixtures("quick_compilation")

WIDE = "dit(patch=4,width=128,depth=1,heads=2)"


def losses(mesh, network, count=4):
    """Losses of the first steps, one by one, and the state after them."""
    _, program, feed = toys.digits_run(mesh, network=network)
    state, found = program.init(), []
    for step in range(count):
        state, outcome = program.advance(state, feed.chunk(step, 1), jnp.int32(1), {})
        found.append(float(outcome.sums["loss"][0]))
    return found, state


@pytest.fixture(scope="module")
def alone():
    return losses(toys.mesh(), WIDE)


@pytest.mark.parametrize(
    "axes", [(8, 1, 1), (2, 2, 2), *(pytest.param(a, marks=pytest.mark.slow) for a in ((2, 4, 1), (1, 1, 8)))]
)
def test_one_device_and_eight_agree(alone, axes):
    """The same examples, the same noise an example, the same losses: only the order of float32 sums differs."""
    found, state = losses(toys.mesh(*axes), WIDE)
    np.testing.assert_allclose(found, alone[0], rtol=2e-5)
    # Adam divides by a gradient's own size, so where a gradient is next to nothing the sign of rounding decides.
    close = [
        np.mean(np.abs(np.asarray(a) - np.asarray(b)) < 1e-4)
        for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(alone[1].params), strict=True)
    ]
    assert min(close) > 0.99


def test_what_is_large_is_cut_and_state_lies_with_its_parameter():
    _, program, _ = toys.digits_run(toys.mesh(2, 2, 2), network=WIDE)
    state = program.init()
    params, moments = state.params["denoiser"]["block_0"], state.opt_state["denoiser"]
    assert params["mlp_in"]["kernel"].sharding.spec == P("fsdp", "tensor")
    assert params["mlp_out"]["kernel"].sharding.spec == P("tensor", "fsdp")
    assert params["mlp_in"]["kernel"].addressable_shards[0].data.size == params["mlp_in"]["kernel"].size // 4
    mu = [
        leaf for path, leaf in jax.tree_util.tree_leaves_with_path(moments) if "mlp_in" in str(path) and leaf.ndim == 2
    ]
    assert mu
    assert all(leaf.sharding.spec == P("fsdp", "tensor") for leaf in mu)
    assert state.ema["main"]["denoiser"]["block_0"]["mlp_in"]["kernel"].sharding.spec == P("fsdp", "tensor")
    assert params["mlp_in"]["bias"].sharding.spec == P()


def test_rules_of_the_config_come_first():
    abstract = {"a": {"kernel": jax.ShapeDtypeStruct((512, 512), jnp.float32)}}
    settings = MeshSettings(rules=(("a/kernel$", (None, "data")),))
    found = sharding.infer(abstract, toys.mesh(4, 2, 1), settings)
    assert found["a"]["kernel"].spec == P(None, "data")


def test_axes_that_do_not_divide_stay_whole():
    abstract = {
        "odd": jax.ShapeDtypeStruct((333, 335), jnp.float32),
        "long": jax.ShapeDtypeStruct((7, 40_000), jnp.float32),
    }
    found = sharding.infer(abstract, toys.mesh(1, 8, 1), MeshSettings())
    assert found["odd"].spec in (P(), P(None, None))
    assert found["long"].spec == P(None, "fsdp")


def test_a_mesh_takes_all_devices_on_data_by_default():
    assert dict(sharding.make_mesh(MeshSettings()).shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert dict(sharding.make_mesh(MeshSettings(fsdp=4)).shape) == {"data": 2, "fsdp": 4, "tensor": 1}


@pytest.mark.parametrize("axes", [{"fsdp": 3}, {"data": 3}, {"data": 4}, {"tensor": 16}])
def test_a_mesh_that_does_not_fit_the_devices_is_refused(axes):
    with pytest.raises(UserError, match="8"):
        sharding.make_mesh(MeshSettings(**axes))


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(UserError, match=r"train\.batch_size = 12"):
        sharding.check_batch(toys.mesh(8), "train.batch_size", 12)


@pytest.mark.parametrize(
    "rule", [("x",), ("(", ("data",)), ("x", ("fdsp",)), ("x", "data"), ("x", ("data",)), ("a/kernel", ("data",))]
)
def test_rules_that_are_malformed_or_fit_nothing_are_refused(rule):
    params = {"a": {"kernel": jax.ShapeDtypeStruct((512, 512), jnp.float32)}}
    sharding.check_rules(MeshSettings(rules=(("a/kernel$", (None, "data")),)), params)
    with pytest.raises(UserError, match=r"mesh\.rules"):
        sharding.check_rules(MeshSettings(rules=(rule,)), params)


@pytest.fixture
def promotion_of_jax_attention():
    """jax.nn.dot_product_attention and its gradient mix bfloat16 with float32, which strictness forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.usefixtures("promotion_of_jax_attention")
@pytest.mark.slow  # as in tests/contracts
def test_bfloat16_trains_and_keeps_its_parameters_in_float32():
    _, program, feed = toys.digits_run(toys.mesh(), network=WIDE, precision="bfloat16", steps=100, log_every=100)
    state, outcome = program.advance(program.init(), feed.chunk(0, 100), jnp.int32(100), {})
    _, reference, feed = toys.digits_run(toys.mesh(), network=WIDE, steps=100, log_every=100)
    _, expected = reference.advance(reference.init(), feed.chunk(0, 100), jnp.int32(100), {})
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    assert float(outcome.sums["loss"][0]) == pytest.approx(float(expected.sums["loss"][0]), rel=0.02)
