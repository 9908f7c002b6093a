"""LoLDU's start: A and B from the LDU decomposition of the weight."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedlora.adapters import LoraFactors

from .from_weights import FromWeights


@dataclass(frozen=True)
class Loldu(FromWeights):
    """`s B = P L_r D_r` and `A = U_r` from the decomposition W = P L D U, with ones on the diagonals of L and U.

    Shi et al. 2024, "LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition for Parameter-Efficient
    Fine-Tuning", https://arxiv.org/abs/2410.13618. The paper trains the first entries of D between fixed L and U: that
    is `lora.kind = loldu`. Here its factors are the start of LoRA's A and B, which are both trained. W is not changed;
    the fold takes the start away. All clients need one rank. A strategy that restarts its adapter uses the start in
    round 1 alone. Cost: an LU of each weight on the server, once.
    """

    def factors(self, first: LoraFactors, weight: Tensor) -> LoraFactors:
        """The first columns of P L D and rows of U; a zero on the diagonal leaves its row of U as it is."""
        permutation, lower, upper = torch.linalg.lu(weight)
        diagonal = upper.diagonal()
        unit = upper[: len(diagonal)] / torch.where(diagonal == 0, 1.0, diagonal)[:, None]
        size = torch.where(diagonal == 0, 1.0, diagonal)
        known = min(first.rank, len(diagonal))
        A, B = torch.zeros_like(first.A), torch.zeros_like(first.B)
        A[:known] = unit[:known].to(A)
        B[:, :known] = ((permutation @ lower[:, :known]) * (size[:known] / first.scaling)).to(B)
        return replace(first, A=A, B=B)
