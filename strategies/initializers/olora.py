"""OLoRA: A and B from the QR decomposition of the weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.adapters import LoraFactors

from .from_weights import FromWeights, with_factors


@dataclass(frozen=True)
class OLora(FromWeights):
    """`B = Q_r` and `A = R_r`, the first r columns and rows of W = Q R.

    Büyükakyüz 2024, "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models",
    https://arxiv.org/abs/2406.01775, Algorithm 1. Differences from the paper: W is not changed, the fold takes the
    start away; and signs are such that the diagonal of R is not negative. All clients need one rank. A strategy that
    restarts its adapter uses the start in round 1 alone. Cost: a QR of each weight on the server, once.
    """

    def factors(self, first: LoraFactors, weight: Tensor) -> LoraFactors:
        """The first columns of Q and rows of R."""
        q, r = torch.linalg.qr(weight)
        sign = torch.where(r.diagonal() < 0, -1.0, 1.0).to(r)
        return with_factors(first, (sign[:, None] * r[: len(sign)])[: first.rank], (q * sign)[:, : first.rank])
