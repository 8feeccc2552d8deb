"""Weights that are prepared for a loop: the same function, and nothing of them is made again inside."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import families, networks
from diffusion_jax.types import ImageSpec
from tests.networks.test_networks import TINY, inputs, network

SPEC = ImageSpec(size=8, channels=3, num_classes=5)


@pytest.mark.parametrize("precision", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in ("dit", "edm2", "unet") else pytest.mark.slow) for n in TINY]
)
def test_prepared_weights_are_the_same_function(name, precision):
    params, apply = network(TINY[name], precision)
    with jax.numpy_dtype_promotion("standard"):
        ready = jax.jit(networks.build("family.network", TINY[name], SPEC, precision).prepare)(params)
        np.testing.assert_allclose(apply(ready, *inputs(), None), apply(params, *inputs(), None), atol=1e-6)


def made_in_loops(program, shapes, inside=False):
    """Casts, roots and quotients of arrays as large as a weight, inside the solver's loop of a traced program."""
    found = []
    for equation in program.eqns:
        sizes = [v.aval.shape for v in equation.outvars]
        if inside and equation.primitive.name in ("convert_element_type", "sqrt", "div") and set(sizes) & shapes:
            found.append((equation.primitive.name, sizes))
        within = inside or equation.primitive.name == "while"
        for value in jax.tree.leaves(equation.params, is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")):
            part = getattr(value, "jaxpr", value)
            if hasattr(part, "eqns"):
                found += made_in_loops(part, shapes, within)
    return found


@pytest.mark.parametrize(
    ("text", "precision"),
    [
        ("edm2(channels=64,multipliers=(1,2),blocks=1,attention=(4,))", "float32"),
        ("dit(patch=2,width=32,depth=2,heads=2)", "bfloat16"),
        ("dit(patch=2,width=32,depth=2,heads=2,scan=True)", "bfloat16"),
        ("unet(channels=32,multipliers=(1,2),blocks=1,attention=(4,))", "bfloat16"),
    ],
)
def test_no_step_of_a_sampler_makes_weights_again(text, precision):
    """With labels, whose guidance is a branch that no compiler moves anything out of, and a branch in the solver."""
    section = {"name": "diffusion", "network": text}
    family = families.build(section, SPEC, precision)
    weights, keys = jax.eval_shape(family.init, jax.random.key(0))[0], jax.random.split(jax.random.key(0), 7)
    shapes = {leaf.shape for leaf in jax.tree.leaves(weights["denoiser"]) if leaf.ndim > 1 and min(leaf.shape) > 2}
    options = family.sampling({"solver": "heun", "guidance": 2.0})
    with jax.numpy_dtype_promotion("standard"):
        traced = jax.make_jaxpr(family.generate)(weights, keys, {"label": jnp.zeros(7, jnp.int32)}, options)
    assert shapes
    assert not made_in_loops(traced.jaxpr, shapes)
