"""Means of factors filled up with zeros to the largest rank. One module's server."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.naive.dense import Part, product
from tests.naive.lora_fair import padded_means


class Module:
    def __init__(self, A: Tensor, B: Tensor, scaling: float) -> None:
        self.A, self.B = scaling * A.double(), B.double()
        self.anchor = torch.zeros(B.shape[0], A.shape[1], dtype=torch.float64)

    def send(self, rank: int, scaling: float, restart: Tensor) -> tuple[Tensor, Tensor]:
        return self.A[:rank] / scaling, self.B[:, :rank]

    def aggregate(self, parts: Sequence[Part]) -> None:
        A, B = padded_means(parts)
        # rows that nobody trained keep their A, with B = 0, so that a larger client finds them alive
        for row in range(A.shape[0], self.A.shape[0]):
            A = torch.cat([A, self.A[row : row + 1]])
            B = torch.cat([B, torch.zeros(B.shape[0], 1, dtype=torch.float64)], dim=1)
        self.A, self.B = A, B

    def total(self) -> Tensor:
        return product(self.B, self.A, 1.0)
