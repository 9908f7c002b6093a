"""Fed-PLoRA: a list of rank-one matrices, of which each client trains some beside the frozen sum of the others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedlora.strategies.methods.fed_plora import turn_of
from tests.naive.dense import Part, mean, product, shares


class Module:
    seed = 0

    def __init__(self, A: Tensor, B: Tensor, scaling: float) -> None:
        self.a = [scaling * row.double() for row in A]
        self.b = [column.double() for column in B.T]
        self.anchor = torch.zeros(B.shape[0], A.shape[1], dtype=torch.float64)
        self.round, self.given = 1, list[list[int]]()

    def send(self, rank: int, scaling: float, restart: Tensor) -> tuple[Tensor, Tensor]:
        """The anchor is that of the client that is sent to."""
        order = turn_of(len(self.a), self.seed, self.round)
        mine, frozen = order[:rank], order[rank:]
        self.given.append(mine)
        self.anchor = torch.zeros_like(self.anchor)
        for j in frozen:
            self.anchor = self.anchor + product(self.b[j][:, None], self.a[j][None], 1.0)
        return torch.stack([self.a[j] / scaling for j in mine]), torch.stack([self.b[j] for j in mine], dim=1)

    def aggregate(self, parts: Sequence[Part]) -> None:
        new_a, new_b = list(self.a), list(self.b)
        for j in range(len(self.a)):
            having = [(part, mine.index(j)) for part, mine in zip(parts, self.given, strict=True) if j in mine]
            if having:
                p = shares([part for part, _ in having])
                new_a[j] = mean([part.scaling * part.A[i].double() for part, i in having], p)
                new_b[j] = mean([part.B[:, i] for part, i in having], p)
        self.a, self.b, self.round, self.given = new_a, new_b, self.round + 1, []

    def total(self) -> Tensor:
        return product(torch.stack(self.b, dim=1), torch.stack(self.a), 1.0)
