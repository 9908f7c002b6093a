"""LoLDU's start: A and B from the LDU decomposition of the weight."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedlora.adapters import LoraFactors
from fedlora.adapters.lowrank import ldu

from .from_weights import FromWeights, with_factors


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
        lower, pivots, upper = ldu(weight, first.rank)
        return with_factors(first, upper, lower * (pivots / first.scaling))
