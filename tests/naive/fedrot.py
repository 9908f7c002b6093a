"""FedRot-LoRA: each client's factors are turned towards the server's by a dense Procrustes. One module's server."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.naive.dense import Part, mean, product, shares


def nearest_turn(moved: Tensor, target: Tensor) -> Tensor:
    """The orthogonal R with the smallest |R' moved - target|; what is left open is as near to the identity as can be.

    Args:
        moved, target: [r, d].
    """
    u, s, vh = torch.linalg.svd(moved @ target.T)
    known = int((s > 1e-7 * s[0]).sum()) if s[0] > 0 else 0
    turn = u[:, :known] @ vh[:known]
    if known < len(s):
        left, right = u[:, known:], vh[known:].T
        p, _, qh = torch.linalg.svd(left.T @ right)
        turn = turn + left @ p @ qh @ right.T
    return turn


class Module:
    def __init__(self, A: Tensor, B: Tensor, scaling: float) -> None:
        self.A, self.B, self.scaling, self.round = A.double(), B.double(), scaling, 1
        self.anchor = torch.zeros(B.shape[0], A.shape[1], dtype=torch.float64)

    def send(self, rank: int, scaling: float, restart: Tensor) -> tuple[Tensor, Tensor]:
        return self.A, self.B

    def aggregate(self, parts: Sequence[Part]) -> None:
        turned_a, turned_b = [], []
        for part in parts:
            A, B = part.A.double(), part.B.double()
            turn = torch.eye(len(A), dtype=torch.float64)
            if self.round > 1:
                turn = nearest_turn(B.T, self.B.T) if self.round % 2 else nearest_turn(A, self.A)
            turned_a.append(turn.T @ A)
            turned_b.append(B @ turn)
        self.A, self.B = mean(turned_a, shares(parts)), mean(turned_b, shares(parts))
        self.round += 1

    def total(self) -> Tensor:
        return product(self.B, self.A, self.scaling)
