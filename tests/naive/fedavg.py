"""FedIT: the mean of the A_k and the mean of the B_k. One module's server."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.naive.dense import Part, mean, product, shares


class Module:
    def __init__(self, A: Tensor, B: Tensor, scaling: float) -> None:
        self.A, self.B, self.scaling = A.double(), B.double(), scaling
        self.anchor = torch.zeros(B.shape[0], A.shape[1], dtype=torch.float64)

    def send(self, rank: int, scaling: float, restart: Tensor) -> tuple[Tensor, Tensor]:
        assert (rank, scaling) == (self.A.shape[0], self.scaling)
        return self.A, self.B

    def aggregate(self, parts: Sequence[Part]) -> None:
        self.A = mean([part.A for part in parts], shares(parts))
        self.B = mean([part.B for part in parts], shares(parts))

    def total(self) -> Tensor:
        return product(self.B, self.A, self.scaling)
