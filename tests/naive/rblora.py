"""Row by row, the mean over the clients that have the row. One module's server."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.naive.dense import Part, mean, product, shares


class Module:
    def __init__(self, A: Tensor, B: Tensor, scaling: float) -> None:
        self.A, self.B = scaling * A.double(), B.double()
        self.anchor = torch.zeros(B.shape[0], A.shape[1], dtype=torch.float64)

    def send(self, rank: int, scaling: float, restart: Tensor) -> tuple[Tensor, Tensor]:
        return self.A[:rank] / scaling, self.B[:, :rank]

    def aggregate(self, parts: Sequence[Part]) -> None:
        self.A, self.B = self.A.clone(), self.B.clone()
        for row in range(self.A.shape[0]):
            having = [part for part in parts if part.A.shape[0] > row]
            if having:
                self.A[row] = mean([part.scaling * part.A[row].double() for part in having], shares(having))
                self.B[:, row] = mean([part.B[:, row] for part in having], shares(having))

    def total(self) -> Tensor:
        return product(self.B, self.A, 1.0)
