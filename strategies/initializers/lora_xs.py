"""LoRA-XS: A and B are fixed to the leading singular directions of the weight, with a core R between them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from fedlora.adapters import LoraFactors
from fedlora.adapters.lowrank import of_matrix

from .from_weights import FromWeights, with_factors


@dataclass(frozen=True)
class LoraXs(FromWeights):
    """`dW = B R A` with B = U_r, A = S_r V_r' and R = 0, where `W = U S V'` is the SVD of the frozen weight.

    Balazy et al. 2024, "LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters",
    https://arxiv.org/abs/2405.17604, eq. 2, with the singular values on the side of the input. Differences: the authors
    draw R from a Gaussian of deviation 1e-5, here R = 0, so that the run starts at the base model; and W is the
    dequantized weight where the base is quantized. The scaling is 1 whatever `lora.alpha` says. A and B tell nothing of
    the clients' rows, so that nothing has to be asked or noised before round 1. Where the rank is larger than
    min(d_out, d_in), the other rows of A and columns of B are zeros. Cost: an SVD of each weight on the server, once.
    The adapter kind of this name computes A and B on every client instead, and works with strategies without cores.

    Args:
        values: whether A has the singular values, as in the paper. Without them, A has orthonormal rows as Fed-SB's
            has: the norm of R is then that of dW, so that clips and noise treat all directions alike.
    """

    values: bool = True

    cores: ClassVar[bool] = True
    cancelled: ClassVar[bool] = False
    unequal_ranks: ClassVar[bool] = True

    def factors(self, first: LoraFactors, weight: Tensor) -> LoraFactors:
        """The leading singular directions, and a core of zeros."""
        u, s, vh = of_matrix(weight, first.rank)
        made = with_factors(replace(first, scaling=1.0), s[:, None] * vh if self.values else vh, u)
        return replace(made, R=made.A.new_zeros(first.rank, first.rank))
