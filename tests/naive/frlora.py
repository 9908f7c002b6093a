"""FRLoRA: the weight loses its leading part, and gains in each round what the mean factors changed. One module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.naive.dense import Part, mean, product, shares


class Module:
    def __init__(self, weight: Tensor, rank: int, scaling: float) -> None:
        u, s, vh = torch.linalg.svd(weight.double() / scaling, full_matrices=False)
        kept = min(rank, len(s))
        self.A = torch.zeros(rank, weight.shape[1], dtype=torch.float64)
        self.B = torch.zeros(weight.shape[0], rank, dtype=torch.float64)
        for i in range(kept):
            self.A[i], self.B[:, i] = s[i] ** 0.5 * vh[i], s[i] ** 0.5 * u[:, i]
        self.scaling, self.start = scaling, product(self.B, self.A, scaling)
        self.anchor = -self.start

    def aggregate(self, parts: Sequence[Part]) -> None:
        new_a, new_b = (mean([getattr(part, factor) for part in parts], shares(parts)) for factor in "AB")
        self.anchor = self.anchor + product(new_b, new_a, self.scaling) - self.start

    def total(self) -> Tensor:
        return self.anchor + self.start
