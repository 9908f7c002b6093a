"""FFA-LoRA: one A for all, and the mean of the B_k, filled up with zero columns. One module's server."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.naive.dense import Part, mean, product, shares


def filled(B: Tensor, rank: int) -> Tensor:
    columns = [B[:, j].double() if j < B.shape[1] else torch.zeros(B.shape[0]).double() for j in range(rank)]
    return torch.stack(columns, dim=1)


class Module:
    trained = "B"

    def __init__(self, A: Tensor, B: Tensor, scaling: float) -> None:
        self.A, self.B = scaling * A.double(), B.double()
        self.anchor = torch.zeros(B.shape[0], A.shape[1], dtype=torch.float64)

    def send(self, rank: int, scaling: float, restart: Tensor) -> tuple[Tensor, Tensor]:
        return self.A[:rank] / scaling, self.B[:, :rank]

    def aggregate(self, parts: Sequence[Part]) -> None:
        self.B = mean([filled(part.B, len(self.A)) for part in parts], shares(parts))

    def total(self) -> Tensor:
        return product(self.B, self.A, 1.0)
