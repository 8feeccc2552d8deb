"""What a user sets of every transformer over tokens."""

from dataclasses import dataclass
from typing import Any

from diffusion_jax.networks import remat
from diffusion_jax.networks.transformer import BlockOptions


@dataclass(frozen=True, kw_only=True)
class StackOptions:
    """A stack of one block, of which a network's own options say the `parts`.

    Attributes:
      width: of the residual stream; divisible by 4 and by `heads`.
      depth: number of blocks.
      heads: of each attention.
      mlp_ratio: width of a plain MLP's hidden layer over `width`; SwiGLU's is two thirds of it.
      dropout: probability in the outputs of attention and MLP, and in the tokens that enter where a paper has it there.
      attention: a row of `attention.IMPLEMENTATIONS`, or "auto".
      scan: compile one block for all; its parameters are stacked.
      remat: from `remat.POLICIES`, what the backward pass keeps of each block.
    """

    width: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    attention: str = "auto"
    scan: bool = False
    remat: str = "none"

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise ValueError(f"depth must be at least 1, not {self.depth}")
        remat.check(self.remat)
        self.block()

    def parts(self) -> dict[str, Any]:
        """What the network's block has beside its sizes."""
        return {}

    def block(self) -> BlockOptions:
        """One block of the stack."""
        return BlockOptions(
            width=self.width,
            heads=self.heads,
            mlp_ratio=self.mlp_ratio,
            dropout=self.dropout,
            attention=self.attention,
            **self.parts(),
        )
