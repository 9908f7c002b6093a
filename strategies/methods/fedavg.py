"""FedAvg over the factors, as in FedIT: the mean of the A and the mean of the B, for clients of one rank."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from fedlora.exchange import ClientUpdate

from ..base import ServerState
from ..tools.one_rank import OneRank, checked, factor_means


@dataclass(frozen=True)
class FedAvg(OneRank):
    """`A = sum_k p_k A_k`, `B = sum_k p_k B_k`, with p_k = n_k / sum(n).

    Zhang et al. 2023, "Towards Building the Federated GPT: Federated Instruction Tuning" (FedIT),
    https://arxiv.org/abs/2305.05644, Algorithm 1. The product of the means is not the mean of the products: it
    lacks `sum_k p_k s (B_k - B)(A_k - A)`.
    Memory: one reply, since each is added to the means when it arrives.
    """

    method: ClassVar[str] = "fedavg"
    linear: ClassVar[bool] = True
    of_mean: ClassVar[bool] = True
    steady: ClassVar[bool] = True
    any_kind: ClassVar[bool] = True

    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate], number: int) -> ServerState:
        """The means of A and of B. A module or tensor that no reply contains keeps its value.

        Raises:
            StrategyError: a reply's rank differs from the server's, or its scaling from that of the first reply.
        """
        return state.updated(*factor_means(checked(updates, number, state.adapter.lora, self.method)))
