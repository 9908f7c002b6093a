"""RAVAN: each head's product as a matrix, in plain loops, and the mean of the clients' whole updates. One module."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor


def update(H: Tensor, s: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """sum_i s_i B_i H_i A_i, with A_i the i-th rows of A [h r, d_in], and B_i the i-th columns of B [d_out, h r]."""
    heads, rank, _ = H.shape
    total = torch.zeros(B.shape[0], A.shape[1], dtype=torch.float64)
    for head in range(heads):
        own = slice(head * rank, (head + 1) * rank)
        total += float(s[head]) * B[:, own].double() @ H[head].double() @ A[own].double()
    return total


def mean(updates: Sequence[Tensor], examples: Sequence[int]) -> Tensor:
    return torch.stack([n / sum(examples) * each for each, n in zip(updates, examples, strict=True)]).sum(dim=0)


def mean_of_heads(
    before: Sequence[Tensor],
    ends: Mapping[int, Sequence[Tensor]],
    trained: Mapping[int, Collection[int]],
    rows: Mapping[int, int],
) -> list[Tensor]:
    """Each head's mean over the clients that trained it, by their rows; a head without one as it was."""
    means: list[Tensor] = []
    for head, old in enumerate(before):
        total, weight = torch.zeros_like(old, dtype=torch.float64), 0
        for client, own in trained.items():
            if head in own:
                total += rows[client] * ends[client][head].double()
                weight += rows[client]
        means.append(total / weight if weight else old.double())
    return means
