"""Dense arithmetic in plain loops, on fp64 matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """What one client trained in one module, with its weight."""

    A: Tensor
    B: Tensor
    scaling: float
    examples: int


def product(B: Tensor, A: Tensor, scaling: float) -> Tensor:
    """scaling * B @ A, entry by entry."""
    b, a = B.double().tolist(), A.double().T.tolist()
    rows = [[scaling * sum(x * y for x, y in zip(row, column, strict=True)) for column in a] for row in b]
    return torch.tensor(rows, dtype=torch.float64)


def shares(parts: Sequence[Part]) -> list[float]:
    return [part.examples / sum(other.examples for other in parts) for part in parts]


def ideal(parts: Sequence[Part]) -> Tensor:
    """sum_k p_k s_k B_k A_k."""
    total = torch.zeros(parts[0].B.shape[0], parts[0].A.shape[1], dtype=torch.float64)
    for part, share in zip(parts, shares(parts), strict=True):
        total = total + share * product(part.B, part.A, part.scaling)
    return total


def mean(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = torch.zeros(tensors[0].shape, dtype=torch.float64)
    for tensor, weight in zip(tensors, weights, strict=True):
        total = total + weight * tensor.double()
    return total
