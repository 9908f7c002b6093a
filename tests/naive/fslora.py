"""FSLoRA: full-sized factors with a diagonal matrix of R/k and zeros between them, and masked means. One module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sketched:
    """What one client trained: its whole B and A, of which the drawn rows alone moved."""

    A: Tensor
    B: Tensor
    rows: Sequence[int]
    examples: int


def sketch(rank: int, rows: Sequence[int]) -> Tensor:
    """The diagonal matrix S with R/k at the drawn places."""
    diagonal = [rank / len(rows) if row in rows else 0.0 for row in range(rank)]
    return torch.diag(torch.tensor(diagonal, dtype=torch.float64))


class Module:
    def __init__(self, A: Tensor, B: Tensor, scaling: float) -> None:
        self.A, self.B, self.scaling = A.double(), B.double(), scaling

    def sent(self, rows: Sequence[int]) -> Tensor:
        """The update that a client starts from."""
        return self.scaling * self.B @ sketch(len(self.A), rows) @ self.A

    def aggregate(self, parts: Sequence[Sketched]) -> None:
        A, B = self.A.clone(), self.B.clone()
        total = sum(part.examples for part in parts)
        for part in parts:
            for row in part.rows:
                A[row] += part.examples / total * (part.A[row] - self.A[row])
                B[:, row] += part.examples / total * (part.B[:, row] - self.B[:, row])
        self.A, self.B = A, B

    def total(self) -> Tensor:
        return self.scaling * self.B @ self.A
