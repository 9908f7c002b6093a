"""FlexLoRA: the dense mean update is kept at the largest rank, and each client gets its best part. One module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.naive.dense import Part, ideal


def best(matrix: Tensor, rank: int) -> Tensor:
    """The nearest matrix of this rank, one component at a time."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    total = torch.zeros_like(matrix)
    for i in range(min(rank, len(s))):
        total = total + s[i] * torch.outer(u[:, i], vh[i])
    return total


class Module:
    def __init__(self, A: Tensor, B: Tensor, scaling: float) -> None:
        self.rank = A.shape[0]
        self.update = torch.zeros(B.shape[0], A.shape[1], dtype=torch.float64)
        self.anchor = self.update

    def send(self, rank: int, scaling: float, restart: Tensor) -> tuple[Tensor, Tensor]:
        """Components while there are any, then the rows that the server had, with B = 0."""
        u, s, vh = torch.linalg.svd(self.update, full_matrices=False)
        A, B = restart[:rank].double().clone(), torch.zeros(self.update.shape[0], rank, dtype=torch.float64)
        for i in range(min(rank, len(s))):
            if s[i] > 1e-6 * s[0]:
                A[i] = (s[i] / scaling) ** 0.5 * vh[i]
                B[:, i] = (s[i] / scaling) ** 0.5 * u[:, i]
        return A, B

    def aggregate(self, parts: Sequence[Part]) -> None:
        self.update = best(ideal(parts), self.rank)

    def total(self) -> Tensor:
        return self.update
