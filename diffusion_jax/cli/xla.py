"""XLA's flags for programs on CPUs, set before jax starts.

A process reads XLA_FLAGS once, and ends on a flag that its jaxlib does not know. What is here changes programs for
CPUs alone, on whatever machine.
"""

from collections.abc import MutableMapping
from importlib.metadata import version

CPU_FLAGS = {"xla_cpu_experimental_ynn_fusion_type": ""}
"""Products and convolutions go to Eigen and not to YNNPACK, whose gradients of convolutions take up to five times as
long (docs/performance.md)."""

KNOWN_TO = ((0, 10), (0, 12))
"""The first and the last minor version of jaxlib that was seen to know CPU_FLAGS."""


def set_cpu_flags(environment: MutableMapping[str, str]) -> None:
    """Add CPU_FLAGS to XLA_FLAGS in `environment`, but for those that stand there already."""
    major, minor = map(int, version("jaxlib").split(".")[:2])
    if not KNOWN_TO[0] <= (major, minor) <= KNOWN_TO[1]:
        return
    given = environment.get("XLA_FLAGS", "")
    new = [f"--{name}={value}" for name, value in CPU_FLAGS.items() if name not in given]
    environment["XLA_FLAGS"] = " ".join([*given.split(), *new])
