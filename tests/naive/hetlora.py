"""HetLoRA: padded means, weighted by the Frobenius norms of the dense updates. One module's server."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.naive.dense import Part, product


def weights(parts: Sequence[Part]) -> list[float]:
    """|dW_k|_F over their sum; equal where nothing moved."""
    norms = []
    for part in parts:
        squares = [x * x for row in product(part.B, part.A, part.scaling).tolist() for x in row]
        norms.append(sum(squares) ** 0.5)
    return [n / sum(norms) for n in norms] if sum(norms) > 0 else [1 / len(parts)] * len(parts)


class Module:
    def __init__(self, A: Tensor, B: Tensor, scaling: float) -> None:
        self.A, self.B = scaling * A.double(), B.double()
        self.anchor = torch.zeros(B.shape[0], A.shape[1], dtype=torch.float64)

    def send(self, rank: int, scaling: float, restart: Tensor) -> tuple[Tensor, Tensor]:
        return self.A[:rank] / scaling, self.B[:, :rank]

    def aggregate(self, parts: Sequence[Part]) -> None:
        largest = max(part.A.shape[0] for part in parts)
        A, B = self.A.clone(), torch.zeros_like(self.B)  # rows that nobody trained keep their A, with B = 0
        A[:largest] = 0
        for part, weight in zip(parts, weights(parts), strict=True):
            for row in range(part.A.shape[0]):
                A[row] += weight * part.scaling * part.A[row].double()
                B[:, row] += weight * part.B[:, row].double()
        self.A, self.B = A, B

    def total(self) -> Tensor:
        return product(self.B, self.A, 1.0)
