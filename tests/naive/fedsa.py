"""FedSA-LoRA: rows of A are averaged over the clients that have them; every client keeps its own B. One module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.naive.dense import Part


class Module:
    def __init__(self, A: Tensor, B: Tensor, scaling: float) -> None:
        self.A = scaling * A.double()  # with the scale in it
        self.d_out = B.shape[0]
        self.own: dict[int, Tensor] = {}

    def send(self, client: int, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
        fresh = torch.zeros(self.d_out, rank, dtype=torch.float64)
        return self.A[:rank] / scaling, self.own.get(client, fresh)

    def aggregate(self, parts: Sequence[Part], trained_b: dict[int, Tensor]) -> None:
        self.own |= trained_b
        rows = []
        for row, before in enumerate(self.A):
            have = [part for part in parts if part.A.shape[0] > row]
            total = sum(part.examples for part in have)
            new = torch.zeros_like(before)
            for part in have:
                new = new + part.examples / total * part.scaling * part.A[row].double()
            rows.append(new if have else before)
        self.A = torch.stack(rows)
