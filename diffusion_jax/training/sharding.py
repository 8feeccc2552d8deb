"""The mesh, and which axis of which array lies on which axis of the mesh."""

import math
import re

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from diffusion_jax import tree
from diffusion_jax.errors import require
from diffusion_jax.settings import MeshSettings
from diffusion_jax.types import Tree

LARGE = 2**16
"""Arrays with fewer elements than this are not worth cutting."""

RULES = (
    (r"/(qkv|q|k|v|mlp_in)/kernel$", ("fsdp", "tensor")),
    (r"/(attention_out|mlp_out)/kernel$", ("tensor", "fsdp")),
)
"""Matrices between which activations may stay cut: columns of the first, rows of the second (Megatron's pairs)."""

BATCH = P(("data", "fsdp"))
"""The first axis of a batch."""


def make_mesh(settings: MeshSettings) -> Mesh:
    """The mesh (data, fsdp, tensor) over all devices.

    Raises:
      UserError: where the axes do not multiply to the number of devices.
    """
    devices = jax.device_count()
    inner = settings.fsdp * settings.tensor
    if settings.data == -1:
        require(devices % inner == 0, "mesh.fsdp * mesh.tensor", inner, f"must divide the number of devices, {devices}")
    data = devices // inner if settings.data == -1 else settings.data
    sizes = (data, settings.fsdp, settings.tensor)
    require(math.prod(sizes) == devices, "mesh (data, fsdp, tensor)", sizes, f"must multiply to {devices} devices")
    auto = (jax.sharding.AxisType.Auto,) * 3
    return jax.make_mesh(sizes, ("data", "fsdp", "tensor"), axis_types=auto)


def batch_ways(mesh: Mesh) -> int:
    """Over how many devices a batch is cut."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch(mesh: Mesh, field: str, size: int) -> None:
    """Raise `UserError` unless a batch of `size` can be cut evenly over the mesh."""
    ways = batch_ways(mesh)
    require(size % ways == 0, field, size, f"must be divisible by the {ways} devices that share the batch")


def infer(abstract: Tree, mesh: Mesh, settings: MeshSettings) -> Tree:
    """A `NamedSharding` for every leaf of an abstract tree.

    The first rule whose expression is found in a leaf's path, and whose axes are as many as the leaf's, says how it is
    cut: first the config's own rules, then, for large arrays, `RULES`. A large array that no rule names is cut along
    its longest divisible axis over `fsdp`. Optimizer state and averages have their parameter's path at their
    end, so they lie where it lies. An axis that does not divide evenly stays whole.
    """

    def of(path: tuple, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        return NamedSharding(mesh, _spec(tree.path_name(path), leaf.shape, mesh, settings.rules))

    return jax.tree_util.tree_map_with_path(of, abstract)


def _spec(name: str, shape: tuple[int, ...], mesh: Mesh, own: tuple) -> P:
    small = math.prod(shape) < LARGE
    for pattern, axes in own if small else (*own, *RULES):
        if re.search(pattern, name) and len(axes) == len(shape):
            fits = [a if a and size % mesh.shape[a] == 0 else None for a, size in zip(axes, shape, strict=True)]
            return P(*fits)
    if small:
        return P()
    axis = next((int(i) for i in np.argsort(shape)[::-1] if shape[i] % mesh.shape["fsdp"] == 0), None)
    return P(*("fsdp" if i == axis else None for i in range(len(shape))))


def check_rules(settings: MeshSettings, params: Tree) -> None:
    """Raise `UserError` unless every rule is (regular expression, axes or None) and fits some array of `params`."""
    shapes = {tree.path_name(path): leaf.shape for path, leaf in jax.tree.leaves_with_path({"params": params})}
    for rule in settings.rules:
        ok = isinstance(rule, tuple) and len(rule) == 2 and isinstance(rule[0], str) and isinstance(rule[1], tuple)
        ok = ok and all(axis in (None, "data", "fsdp", "tensor") for axis in rule[1])
        ok = ok and all(rule[1].count(axis) == 1 for axis in rule[1] if axis)
        require(
            ok,
            "mesh.rules",
            rule,
            "write (regular expression, (axis or None, ...)) with each of the mesh's axes once at most",
        )
        try:
            re.compile(rule[0])
        except re.error as error:
            require(False, "mesh.rules", rule[0], f"is no regular expression ({error})")
        fits = any(re.search(rule[0], name) and len(shape) == len(rule[1]) for name, shape in shapes.items())
        require(fits, "mesh.rules", rule, f"no parameter has such a path and {len(rule[1])} axes")
