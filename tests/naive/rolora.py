"""RoLoRA: the mean of B after odd rounds, of s_k A_k after even ones, filled up with zeros. One module's server."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.naive import ffa
from tests.naive.dense import Part, mean, shares


class Module(ffa.Module):
    def aggregate(self, parts: Sequence[Part]) -> None:
        rank = len(self.A)
        if self.trained == "B":
            new_a, new_b = self.A, mean([ffa.filled(part.B, rank) for part in parts], shares(parts))
        else:
            all_a = [part.scaling * ffa.filled(part.A.T, rank).T for part in parts]
            new_a, new_b = mean(all_a, shares(parts)), self.B
        for j in range(rank):
            if not new_a[j].any() and not new_b[:, j].any():  # it would never train again
                new_a, new_b = replaced(new_a, j, self.A[j]), replaced(new_b.T, j, self.B[:, j]).T
        self.A, self.B = new_a, new_b
        self.trained = "A" if self.trained == "B" else "B"


def replaced(rows: Tensor, index: int, row: Tensor) -> Tensor:
    return torch.stack([row if j == index else rows[j] for j in range(len(rows))])
