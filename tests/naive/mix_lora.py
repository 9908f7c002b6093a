"""A mixture of LoRA experts beside one layer, in plain loops."""

from __future__ import annotations

import torch
from torch import Tensor


def mixture(x: Tensor, A: Tensor, B: Tensor, R: Tensor, top_k: int, scale: float) -> Tensor:
    """What the experts add to the output of each row of x [n, d_in]."""
    rows: list[Tensor] = []
    for token in x:
        exponentials = [float(torch.exp(row @ token)) for row in R]
        best = sorted(range(len(R)), key=lambda e: -exponentials[e])[:top_k]
        total, row = sum(exponentials[e] for e in best), torch.zeros(B.shape[1])
        for e in best:
            row = row + exponentials[e] / total * scale * (B[e] @ (A[e] @ token))
        rows.append(row)
    return torch.stack(rows)


def balance_gradient(x: Tensor, R: Tensor, top_k: int) -> tuple[float, Tensor]:
    """`E sum_e F_e P_e`, and its gradient by R [E, d_in], by the softmax's own derivative."""
    count, experts = len(x), len(R)
    F = [0.0] * experts
    for token in x:
        for e in torch.topk(R @ token, top_k).indices.tolist():
            F[e] += 1 / count
    value, gradient = 0.0, torch.zeros_like(R)
    for token in x:
        p = torch.softmax(R @ token, dim=0)
        value += experts * sum(F[e] * float(p[e]) for e in range(experts)) / count
        for e in range(experts):
            for other in range(experts):
                change = float(p[e]) * ((e == other) - float(p[other]))
                gradient[other] += experts * F[e] * change * token / count
    return value, gradient
