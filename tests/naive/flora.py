"""FLoRA: the ideal is added to the base, and training restarts from a random A and B = 0. One module's server."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.naive.dense import Part, ideal


class Module:
    def __init__(self, A: Tensor, B: Tensor, scaling: float) -> None:
        self.shape = (B.shape[0], A.shape[1])
        self.anchor = torch.zeros(self.shape, dtype=torch.float64)

    def send(self, rank: int, scaling: float, restart: Tensor) -> tuple[Tensor, Tensor]:
        return restart[:rank].double(), torch.zeros(self.shape[0], rank, dtype=torch.float64)

    def aggregate(self, parts: Sequence[Part]) -> None:
        self.anchor = self.anchor + ideal(parts)

    def total(self) -> Tensor:
        return self.anchor
