"""Rematerialisation: which values of a block the backward pass keeps, and which it computes again.

A block that keeps its input alone costs one more forward pass, and the memory of a deep network becomes that of its
residual stream (Chen et al. 2016, "Training deep nets with sublinear memory cost").
"""

from typing import TypeVar

import flax.linen as nn
import jax

from diffusion_jax.networks.convolution import CONVOLVED

M = TypeVar("M", bound=type[nn.Module])


PRODUCTS = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names(CONVOLVED),
)
"""Keep what dense layers and convolutions return: it costs the most to compute again.

Products with a batch axis are attention's, over T x T numbers a head; those are computed again.
"""

POLICIES = {
    "none": jax.checkpoint_policies.everything_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": PRODUCTS,
}
"""name -> what is kept: everything, nothing but the block's input, or products with weights."""


def check(policy: str) -> None:
    """Raise a ValueError where `policy` is no row of POLICIES."""
    if policy not in POLICIES:
        raise ValueError(f"remat must be one of {', '.join(POLICIES)}, not {policy!r}")


def block(module: M, policy: str, *, in_scan: bool = False) -> M:
    """`module` with the same function, parameters and gradients, whose backward pass keeps what `policy` names.

    Args:
      module: class of a block, called with arrays, keys or None. Its instances need an explicit name.
      policy: from POLICIES.
      in_scan: whether the block is the body of a scan, which needs no guard against the compiler's undoing the
        rematerialisation by common subexpressions.
    """
    if policy == "none":
        return module
    return nn.remat(module, policy=POLICIES[policy], prevent_cse=not in_scan)
