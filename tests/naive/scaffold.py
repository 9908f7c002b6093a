"""SCAFFOLD on quadratic losses, with every client's variate at hand: no sums that grow, no messages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def scaffold(
    hessians: Sequence[Tensor],
    centres: Sequence[Tensor],
    rows: Sequence[int],
    rates: Sequence[float],
    chosen: Sequence[Sequence[int]],
    lost: Sequence[tuple[int, int]] = (),
) -> list[Tensor]:
    """x [8] after each round.

    Args:
        hessians, centres: the clients' losses.
        rows: the clients' weights.
        rates: learning rates of the steps of a round.
        chosen: the clients of each round.
        lost: (round from 1, client) of the replies that never arrive, as if these clients had not been asked.
    """
    x, variates, found = torch.zeros(8).double(), [torch.zeros(8).double() for _ in rows], []
    for number, asked in enumerate(chosen, start=1):
        total = sum(rows)
        c = torch.stack([n / total * own for n, own in zip(rows, variates, strict=True)]).sum(0)
        ends, after = {}, {}
        for k in [k for k in asked if (number, k) not in lost]:
            y, mean = x.clone(), torch.zeros(8).double()
            for rate in rates:
                gradient = hessians[k] @ (y - centres[k])
                mean = mean + gradient * rate / sum(rates)
                y = y - rate * (gradient - variates[k] + c)
            ends[k], after[k] = y, mean
        heard = sum(rows[k] for k in ends)
        x = torch.stack([rows[k] / heard * y for k, y in ends.items()]).sum(0)
        for k, own in after.items():
            variates[k] = own
        found.append(x)
    return found
