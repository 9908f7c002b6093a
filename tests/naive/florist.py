"""FLoRIST: the ideal's strongest components are added to the base, and training restarts. One module's server."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.naive.dense import Part, ideal
from tests.naive.flexlora import best


def smallest_rank(matrix: Tensor, tau: float) -> int:
    """The smallest k whose best approximation has a share tau of the squared Frobenius norm."""
    values = torch.linalg.svdvals(matrix).tolist()
    total, kept = sum(s * s for s in values), 0.0
    for k, s in enumerate(values, start=1):
        kept += s * s
        if kept >= tau * total:
            return k
    return len(values)


class Module:
    tau = 0.99

    def __init__(self, A: Tensor, B: Tensor, scaling: float) -> None:
        self.shape = (B.shape[0], A.shape[1])
        self.anchor = torch.zeros(self.shape, dtype=torch.float64)

    def send(self, rank: int, scaling: float, restart: Tensor) -> tuple[Tensor, Tensor]:
        return restart[:rank].double(), torch.zeros(self.shape[0], rank, dtype=torch.float64)

    def aggregate(self, parts: Sequence[Part]) -> None:
        exact = ideal(parts)
        self.anchor = self.anchor + best(exact, smallest_rank(exact, self.tau))

    def total(self) -> Tensor:
        return self.anchor
