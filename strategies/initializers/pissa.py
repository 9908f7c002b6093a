"""PiSSA: A and B along the largest singular directions of the weight."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedlora.adapters import LoraFactors
from fedlora.adapters.lowrank import of_matrix

from .from_weights import FromWeights, with_factors


@dataclass(frozen=True)
class Pissa(FromWeights):
    """`s B A` is the best approximation of W of rank r: `B = U_r sqrt(S_r / s)` and `A = sqrt(S_r / s) V_r'`.

    Meng, Wang and Zhang 2024, "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language
    Models", https://arxiv.org/abs/2404.02948, eq. 2 and 3. Differences from the paper: W is not changed, and may be
    quantized as it is, where the paper quantizes the residual W - s B A; the fold takes the start away. All clients
    need one rank. A strategy that restarts its adapter uses the start in round 1 alone. Cost: an SVD of each weight on
    the server, once.
    """

    def factors(self, first: LoraFactors, weight: Tensor) -> LoraFactors:
        """The leading singular triplets, split evenly."""
        u, s, vh = of_matrix(weight, first.rank)
        root = (s / first.scaling).sqrt()
        return with_factors(first, root[:, None] * vh, u * root)
