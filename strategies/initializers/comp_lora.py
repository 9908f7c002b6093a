"""Comp-LoRA: updates that leave the largest singular directions of the weight alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from fedlora.adapters import LoraFactors
from fedlora.adapters.lowrank import of_matrix
from fedlora.common.errors import ConfigError
from fedlora.exchange import Term

from .from_weights import FromWeights


@dataclass(frozen=True)
class CompLora(FromWeights):
    """`dW = (I - U_k U_k') B A (I - V_k V_k')`, where U_k and V_k are the k leading singular directions of W.

    Experimental: "Comp-LoRA" (complementary subspaces, few-shot CLIP) is known here from notes; its k is not confirmed.
    LoRA's own start, with A projected. Clients project A and B after each step, with the directions of their own copy
    of W, so that `U_k' dW = 0` and `dW V_k = 0` hold on every client; means, sums and truncations of such updates are
    such updates. What the base model does along its leading directions is kept. Cost: an SVD of each weight, once on
    the server and once in each client's process; O(d k r) for each step.

    Args:
        k: number of directions that are left alone, at least 1.
    """

    k: int = 16

    cancelled: ClassVar[bool] = False
    unequal_ranks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ConfigError(f"lora.init-options: comp-lora's k = {self.k}, expected at least 1")

    @property
    def terms(self) -> tuple[Term, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Keeps the clients in the complement."""
        return (Term("complement", weight=1.0, value=float(self.k)),)

    def factors(self, first: LoraFactors, weight: Tensor) -> LoraFactors:
        """A without what lies in the leading right singular directions."""
        _, _, vh = of_matrix(weight, self.k)
        A = first.A.double()
        return replace(first, A=(A - (A @ vh.T) @ vh).to(first.A))
