"""Block-LoRA: the rows of A are one block, repeated; the same updates as those of LoRA at a smaller rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fedlora.common.errors import ConfigError

from ..algebra import uniform
from ..state import LoraFactors
from .base import AdapterKind, Parts, Place, check_positive


@dataclass(frozen=True)
class BlockLora(AdapterKind):
    """`dW = c B [A; A; ...; A] = c (sum_i B_i) A`, where the block A is [r/n, d_in] and B_i [d_out, r/n] are n blocks.

    Experimental: "Block-LoRA" (few-shot CLIP) is known here from notes alone; its initialization is not confirmed, and
    is LoRA's. The updates are those of LoRA at rank r/n with B = sum_i B_i. Only the optimizer's steps differ: n equal
    gradients move the sum n times as far as one does. For that reason plain LoRA at rank r/n is the comparison to make.
    The mean of the parts is not the mean of the updates. A client uploads r/n d_in + r d_out numbers for a layer.

    Args:
        blocks: n, which divides the rank.
        scale: c, which is LoRA's alpha / r; `lora.alpha` is not used.
    """

    blocks: int = 2
    scale: float = 2.0

    name: ClassVar[str] = "blocklora"

    def __post_init__(self) -> None:
        if self.blocks < 1:
            raise ConfigError(f"lora.kind-options: block-lora's blocks = {self.blocks}, expected at least 1")
        check_positive("block-lora", scale=self.scale)

    def check(self, rank: int) -> None:
        if rank % self.blocks:
            raise ConfigError(
                f"lora.kind = block-lora has {self.blocks} blocks of equal rank, which rank {rank} cannot be divided "
                f"into; set lora.rank to a multiple of {self.blocks}, or blocks in lora.kind-options"
            )

    def shapes(self, place: Place) -> dict[str, tuple[int, ...]]:
        rows = place.rank // self.blocks
        return {"A": (rows, place.d_in), "B": (self.blocks, place.d_out, rows)}

    def rank(self, parts: Parts) -> int:
        return self.blocks * len(parts["A"])

    def initial(self, place: Place, generator: torch.Generator) -> dict[str, Tensor]:
        shapes = self.shapes(place)
        return {"A": uniform(shapes["A"], generator), "B": torch.zeros(shapes["B"])}

    def forward(self, x: Tensor, parts: Parts, constants: Parts, place: Place) -> Tensor:
        return self.scale * F.linear(F.linear(x, parts["A"]), parts["B"].sum(dim=0))

    def factors(self, parts: Parts, constants: Parts, place: Place) -> LoraFactors:
        return LoraFactors(A=parts["A"], B=parts["B"].sum(dim=0), scaling=self.scale)
