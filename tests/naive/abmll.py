"""Each entry's Gaussian, multiplied by one client's after another. One module's server."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.naive.dense import Part, product, shares


def times(mean: Tensor, precision: float, other: Tensor, other_precision: float) -> tuple[Tensor, float]:
    """The product of two Gaussian densities: (its mean, its precision)."""
    total = precision + other_precision
    return (precision * mean + other_precision * other) / total, total


class Module:
    def __init__(self, A: Tensor, B: Tensor, scaling: float, memory: float = 0.0) -> None:
        self.A, self.B, self.memory = scaling * A.double(), B.double(), memory
        self.anchor = torch.zeros(B.shape[0], A.shape[1], dtype=torch.float64)
        self.precision = [0.0] * A.shape[0]

    def send(self, rank: int, scaling: float, restart: Tensor) -> tuple[Tensor, Tensor]:
        return self.A[:rank] / scaling, self.B[:, :rank]

    def aggregate(self, parts: Sequence[Part]) -> None:
        self.A, self.B = self.A.clone(), self.B.clone()
        for row in range(self.A.shape[0]):
            a, b = self.A[row], self.B[:, row]
            of_a = of_b = self.memory * self.precision[row]
            for part, share in zip(parts, shares(parts), strict=True):
                if part.A.shape[0] > row:
                    a, of_a = times(a, of_a, part.scaling * part.A[row].double(), share)
                    b, of_b = times(b, of_b, part.B[:, row].double(), share)
            self.A[row], self.B[:, row], self.precision[row] = a, b, of_a

    def total(self) -> Tensor:
        return product(self.B, self.A, 1.0)
