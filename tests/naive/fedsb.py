"""Fed-SB: fixed A and B from the dense mean gradient's SVD, and the mean of R, entry by entry. One module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Module:
    def __init__(self, gradients: Sequence[Tensor], examples: Sequence[int], rank: int, first_step: float) -> None:
        mean = sum(n / sum(examples) * g.double() for g, n in zip(gradients, examples, strict=True))
        u, s, vh = torch.linalg.svd(-mean)
        self.B, self.A = u[:, :rank], vh[:rank]
        size = float(s[:rank].square().sum()) ** 0.5
        self.R = torch.diag(s[:rank]) * first_step * mean.numel() ** 0.5 / size

    def send(self, rank: int) -> Tensor:
        return self.R[:rank, :rank]

    def aggregate(self, cores: Sequence[Tensor], examples: Sequence[int]) -> None:
        """A smaller block stands for zeros outside it."""
        new = torch.zeros_like(self.R)
        for core, n in zip(cores, examples, strict=True):
            for i in range(core.shape[0]):
                for j in range(core.shape[1]):
                    new[i, j] += n / sum(examples) * core[i, j]
        self.R = new

    def total(self) -> Tensor:
        return self.B @ self.R @ self.A
