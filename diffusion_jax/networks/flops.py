"""How many multiply-adds one forward pass takes: from shapes alone, and from the program that XLA compiles.

    A B,  A [m,k], B [k,n]      m k n
    convolution                 numbers out x side of the kernel^2 x channels in / groups, padding included;
                                zeros between pixels, as in a transposed convolution, are not
    x y + z,  elementwise       one a number: modulations and gates are such

The last line is below 0.1 % of a published network. Papers leave it out, or count norms instead: the figures of Peebles
& Xie 2022, Table 4, are the products and one a normalised number (DiT-XL/2: 118.62e9 + 0.02e9).
"""

import math
import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn

from diffusion_jax.networks import Network, gan
from diffusion_jax.types import ImageSpec, Tree

OPAQUE = ("while", "pallas_call", "custom_partitioning", "dot_product_attention_fwd_wrapper")
"""Primitives whose work their shapes do not tell: loops of unknown length, and kernels written by hand."""


def multiply_adds(network: Network, image: ImageSpec) -> float:
    """Of `network.apply` on one image of `image`, from the shapes in its traced program; nothing is allocated.

    Where the program differs between platforms, the branch counts that can be looked into.

    Raises:
      ValueError: where the program holds a loop of unknown length, or kernels written by hand alone.
    """
    return multiply_adds_of(network.apply, *shapes(network, image))


def multiply_adds_of(function: Callable, *arguments: Any) -> float:
    """Of `function(*arguments)`, of which shapes suffice. Raises as `multiply_adds`."""
    return float(_of_program(jax.make_jaxpr(function)(*arguments).jaxpr))


class Counts(NamedTuple):
    """Multiply-adds of one function, counted three ways.

    `compiled` is the part that papers mean of `cost_analysis`. That one also has half a multiply-add for every other
    number that is added, divided or compared (0.7 % of DiT-S/2, 0.2 % of DiT-XL/2), leaves out products with padding
    (6 % of DDPM's U-Net for CIFAR-10), and counts the body of a loop once.

    Attributes:
      shapes: as `multiply_adds`.
      compiled: the same of the program that XLA makes of it for this machine's CPU.
      cost_analysis: XLA's own sum, `compiled.cost_analysis()["flops"]` / 2.
    """

    shapes: float
    compiled: float
    cost_analysis: float


def counts(network: Network, image: ImageSpec) -> Counts:
    """Of `network.apply` on one image of `image`; nothing is allocated. Raises as `counts_of`."""
    return counts_of(network.apply, *shapes(network, image))


def counts_of(function: Callable, *arguments: Any) -> Counts:
    """Of `function(*arguments)`, of which shapes suffice; it is compiled once.

    Raises:
      ValueError: as `multiply_adds`, and where a compiler's flag has put products into calls that cannot be looked
        into.
    """
    of_shapes = multiply_adds_of(function, *arguments)
    cpu = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    program = jax.jit(function, out_shardings=cpu).lower(*arguments).compile()
    own = float(program.cost_analysis()["flops"]) / 2.0
    return Counts(shapes=of_shapes, compiled=float(_of_text(program.as_text())), cost_analysis=own)


def shapes(network: Network | gan.Discriminator, image: ImageSpec) -> tuple[Tree, ...]:
    """Shapes of (params, x, time, label) for one image."""
    params = jax.eval_shape(network.init, jax.random.key(0))
    x = jax.ShapeDtypeStruct((1, *image.shape), jnp.float32)
    label = jax.ShapeDtypeStruct((1,), jnp.int32) if image.num_classes else None
    return params, x, jax.ShapeDtypeStruct((1,), jnp.float32), label


def shapes_of_pair(
    generator: gan.Generator, discriminator: gan.Discriminator, image: ImageSpec
) -> tuple[tuple[Tree, ...], tuple[Tree, ...]]:
    """Shapes of the generator's (params, z, label, keys) and the discriminator's (params, x, label) for one image."""
    of_discriminator, x, _, label = shapes(discriminator, image)
    of_generator = jax.eval_shape(generator.init, jax.random.key(0))
    z = jax.ShapeDtypeStruct((1, generator.latent), jnp.float32)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
    return (of_generator, z, label, keys), (of_discriminator, x, label)


# ---------------------------------------------------------------------------------------------- from shapes


def _of_program(program: Jaxpr) -> int:
    """Sum over a program's equations."""
    added = {id(v) for e in program.eqns if e.primitive.name in ("add", "sub") for v in e.invars}
    elementwise = [e.outvars[0] for e in program.eqns if _is_product(e) and id(e.outvars[0]) in added]
    return sum(map(_of_equation, program.eqns)) + sum(map(_size, elementwise))


def _is_product(equation: JaxprEqn) -> bool:
    """Whether it multiplies two arrays, number by number; constants and squares are no products."""
    factors = equation.invars
    return equation.primitive.name == "mul" and factors[0] is not factors[1] and all(v.aval.shape for v in factors)


def _size(variable: Any) -> int:
    return math.prod(variable.aval.shape)


def _of_equation(equation: JaxprEqn) -> int:
    """Of a product or convolution, or of the programs inside a call."""
    params = equation.params
    match equation.primitive.name:
        case "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            return _size(equation.outvars[0]) * math.prod(equation.invars[0].aval.shape[i] for i in contracted)
        case "conv_general_dilated":
            kernel, spaced = equation.invars[1].aval.shape, math.prod(params["lhs_dilation"])
            inside = math.prod(kernel) // kernel[params["dimension_numbers"].rhs_spec[0]]
            return _size(equation.outvars[0]) * inside // spaced
        case "scan":
            return params["length"] * _of_program(params["jaxpr"].jaxpr)
        case "cond":
            return _of_branches(params["branches"])
        case name if name in OPAQUE:
            raise ValueError(f"{name}: its multiply-adds cannot be told from shapes")
    return sum(map(_of_program, _inside(params)))


def _of_branches(branches: tuple[Any, ...]) -> int:
    """The most that any branch takes, of those that can be looked into."""
    counts = []
    for branch in branches:
        try:
            counts.append(_of_program(branch.jaxpr))
        except ValueError as error:
            opaque = error
    if not counts:
        raise opaque
    return max(counts)


def _inside(params: dict[str, Any]) -> Iterator[Jaxpr]:
    """The programs that a call, a checkpoint or a function with its own derivative carries."""
    for value in params.values():
        program = getattr(value, "jaxpr", value)
        if hasattr(program, "eqns"):
            yield program


# ---------------------------------------------------------------------------------------------- from what XLA makes

COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>\S+) \(.*\{$")
INSTRUCTION = re.compile(r"^ +(?:ROOT )?%?(?P<name>\S+) = (?P<type>\(.*?\)|\S+) (?P<op>[\w-]+)\((?P<rest>.*)$")
"""XLA prints `%computation (parameters) -> type {`, then lines such as
`%dot.1 = f32[16,384]{1,0} dot(%x, %w), lhs_contracting_dims={1}, ...`."""


def _of_text(text: str) -> int:
    """Of a program, from XLA's print of it."""
    computations: dict[str, dict[str, re.Match]] = {}
    entry = ""
    for line in text.splitlines():
        if head := COMPUTATION.match(line):
            instructions = computations.setdefault(head["name"], {})
            entry = head["name"] if head["entry"] else entry
        elif instruction := INSTRUCTION.match(line):
            instructions[instruction["name"]] = instruction

    @cache
    def count(computation: str) -> int:
        instructions = computations[computation]
        operands = {name: _names(line["rest"].split(")")[0]) for name, line in instructions.items()}
        shapes = {name: _shape(line["type"]) for name, line in instructions.items()}
        constant = {name for name, line in instructions.items() if "dimensions={}" in line["rest"]}
        added = {v for name, line in instructions.items() if line["op"] in ("add", "subtract") for v in operands[name]}
        total = 0
        for name, line in instructions.items():
            out, inside = math.prod(shapes[name]), [shapes.get(v, ()) for v in operands[name]]
            match line["op"]:
                case "dot":
                    total += out * math.prod(inside[0][i] for i in _numbers(line["rest"], "lhs_contracting_dims"))
                case "convolution":
                    labels = re.search(r"dim_labels=\w+_(\w+)->", line["rest"])[1]
                    spaced = re.search(r"lhs_dilate=([\dx]+)", line["rest"])
                    products = out * math.prod(inside[1]) // inside[1][labels.index("o")]
                    total += products // math.prod(map(int, spaced[1].split("x")) if spaced else ())
                case "multiply":
                    constants = constant.intersection(operands[name])
                    total += out * (name in added and len(set(operands[name])) == 2 and not constants)
                case "fusion" | "call":
                    total += count(re.search(r"(?:calls|to_apply)=%?([^\s,]+)", line["rest"])[1])
                case "conditional":
                    total += max(map(count, _names(re.search(r"branch_computations=\{(.*?)\}", line["rest"])[1])))
                case "while":
                    times = int(re.search(r'"known_trip_count":\{"n":"(\d+)"', line["rest"])[1])
                    total += times * count(re.search(r"body=%?([^\s,]+)", line["rest"])[1])
                case "custom-call" if re.search("matmul|gemm|conv", line["rest"]):
                    raise ValueError(f"XLA has put {name} into a call that cannot be looked into")
        return total

    return count(entry)


def _names(text: str) -> list[str]:
    """`%a, %b` as ["a", "b"]."""
    return [name.strip().lstrip("%") for name in text.split(",")]


def _shape(text: str) -> tuple[int, ...]:
    """(16, 384) of `f32[16,384]{1,0}`; () of a tuple of arrays."""
    sizes = re.match(r"\w+\[([\d,]*)\]", text)
    return tuple(map(int, filter(None, sizes[1].split(",")))) if sizes else ()


def _numbers(text: str, name: str) -> list[int]:
    """[1, 2] of `name={1,2}` within `text`."""
    return [int(n) for n in re.search(rf"{name}=\{{([\d,]*)\}}", text)[1].split(",") if n]
