"""LoRA-FAIR with the squared distance: row by row, dense least squares for dB. One module's server."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.naive.dense import Part, ideal, mean, product, shares


def padded_means(parts: Sequence[Part]) -> tuple[Tensor, Tensor]:
    """The means of s_k A_k and of B_k, both filled up with zeros to the largest rank."""
    rank = max(part.A.shape[0] for part in parts)
    all_a, all_b = [], []
    for part in parts:
        a = torch.zeros(rank, part.A.shape[1], dtype=torch.float64)
        b = torch.zeros(part.B.shape[0], rank, dtype=torch.float64)
        for row in range(part.A.shape[0]):
            a[row] = part.scaling * part.A[row].double()
            b[:, row] = part.B[:, row].double()
        all_a.append(a)
        all_b.append(b)
    return mean(all_a, shares(parts)), mean(all_b, shares(parts))


def correction(parts: Sequence[Part], lam: float) -> Tensor:
    """dB: every row d minimises |missed - d A|^2 + lam |d|^2, as least squares with the rows sqrt(lam) I below."""
    mean_a, mean_b = padded_means(parts)
    missed = ideal(parts) - product(mean_b, mean_a, 1.0)
    rank = mean_a.shape[0]
    tall = torch.cat([mean_a.T, lam**0.5 * torch.eye(rank, dtype=torch.float64)])
    rows = []
    for row in missed:
        right = torch.cat([row, torch.zeros(rank, dtype=torch.float64)])
        rows.append(torch.linalg.lstsq(tall, right[:, None], rcond=1e-7, driver="gelsd").solution[:, 0])
    return torch.stack(rows)


class Module:
    lam = 0.01

    def __init__(self, A: Tensor, B: Tensor, scaling: float) -> None:
        self.A, self.B = scaling * A.double(), B.double()
        self.anchor = torch.zeros(B.shape[0], A.shape[1], dtype=torch.float64)

    def send(self, rank: int, scaling: float, restart: Tensor) -> tuple[Tensor, Tensor]:
        return self.A[:rank] / scaling, self.B[:, :rank]

    def aggregate(self, parts: Sequence[Part]) -> None:
        mean_a, mean_b = padded_means(parts)
        mean_b = mean_b + correction(parts, self.lam)
        rank = mean_a.shape[0]
        # rows that nobody trained keep their A, with B = 0, so that a larger client finds them alive
        self.A = torch.cat([mean_a, self.A[rank:]])
        self.B = torch.cat([mean_b, torch.zeros(self.B.shape[0], len(self.A) - rank, dtype=torch.float64)], dim=1)

    def total(self) -> Tensor:
        return product(self.B, self.A, 1.0)
