"""Three clients with quadratic losses of one factor, whose common optimum is known."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedlora.adapters import AdapterState, LoraFactors


def quadratics() -> tuple[AdapterState, list[Tensor], list[Tensor]]:
    """A start; for each client, the H and c of `1/2 |H^(1/2) (x - c)|^2` for a factor x of 8 entries."""
    g = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    factors = LoraFactors(random(2, 5), torch.zeros(4, 2).double(), 1.0)
    halves = [random(8, 8) for _ in range(3)]
    hessians = [half @ half.T / 8 + 0.1 * torch.eye(8) for half in halves]
    return AdapterState(lora={"m": factors}), hessians, [2 * random(8) for _ in range(3)]


def optimum(hessians: Sequence[Tensor], centres: Sequence[Tensor], rows: Sequence[int] = (1, 1, 1)) -> Tensor:
    """Where the sum of all losses, times the clients' rows, is smallest."""
    total, pull = torch.zeros(8, 8).double(), torch.zeros(8).double()
    for H, c, n in zip(hessians, centres, rows, strict=True):
        total, pull = total + n * H, pull + n * (H @ c)
    return torch.linalg.solve(total, pull)
