"""FedEx-LoRA: padded means, and the dense matrix that they miss added to the base. One module's server."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.naive.dense import Part, ideal, product
from tests.naive.fedavg_zeropad import Module as Zeropad


class Module:
    def __init__(self, A: Tensor, B: Tensor, scaling: float) -> None:
        self.means = Zeropad(A, B, scaling)
        self.anchor = torch.zeros(B.shape[0], A.shape[1], dtype=torch.float64)

    def send(self, rank: int, scaling: float, restart: Tensor) -> tuple[Tensor, Tensor]:
        return self.means.send(rank, scaling, restart)

    def aggregate(self, parts: Sequence[Part]) -> None:
        self.means.aggregate(parts)
        self.anchor = self.anchor + ideal(parts) - product(self.means.B, self.means.A, 1.0)

    def total(self) -> Tensor:
        return self.anchor + product(self.means.B, self.means.A, 1.0)
