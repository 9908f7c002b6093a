"""FLoRIST: the leading singular directions of the mean update become a fold, and the adapter starts anew."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from fedlora.adapters import AdapterState, leading, svd_of_sums
from fedlora.common.errors import StrategyError
from fedlora.exchange import Broadcast, ClientInfo, ClientUpdate

from ..base import ServerState, Strategy
from ..tools.replies import gather
from ..tools.restarts import restart, unscaled


@dataclass(frozen=True)
class Florist(Strategy):
    """Folds the best rank-k part of `sum_k p_k s_k B_k A_k`, with the smallest k that keeps a share tau of its energy.

    Ramesh and Dass 2025, "FLoRIST: Singular Value Thresholding for Efficient and Accurate Federated Fine-Tuning of
    Large Language Models", https://arxiv.org/abs/2506.09199. The energy is the sum of the squared singular values
    S, and each module has its own k: `sum_(i<=k) S_i^2 >= tau sum_i S_i^2`. Differences from the paper: the SVD is
    computed from the Gram matrices of the stacked factors instead of from their own SVDs, and A_k is multiplied by the
    client's scaling. The fold and the new start are those of `flora`.
    Memory: the factors of all replies. Cost: O(d R^2 + R^3), where R is the sum of the r_k.

    Args:
        tau: share of the energy that is kept, in (0, 1]. At 0.99 the fold differs from the ideal by at most 10 % of
            the ideal's norm, at a fraction of its rank. At 1 the fold is the ideal.
    """

    tau: float = 0.99

    of_ideal: ClassVar[bool] = True
    anew: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.tau <= 1:
            raise StrategyError(f"strategy.options: florist's tau = {self.tau}, expected a number above 0, at most 1")

    def broadcast(self, state: ServerState, client: ClientInfo, number: int) -> Broadcast:
        """The first r_j rows of the round's random A with B = 0, and the folds that this client lacks.

        Raises:
            StrategyError: the client's rank is larger than the server's.
        """
        sent = super().broadcast(unscaled(state, client), client, number)
        return replace(sent, plan=replace(sent.plan, begun=number, span=1))

    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate], number: int) -> ServerState:
        """The truncated mean update as one more fold, and a new adapter for the next round."""
        parts, dense = gather(updates, number)
        sums = {name: part.ideal for name, part in parts.items()}
        kept = svd_of_sums(sums, lambda s: energy_rank(s, self.tau), whole=self.tau == 1)
        fold = {name: leading(svd, len(svd[1]), dtype=sums[name].dtype) for name, svd in kept.items()}
        fresh = restart(state.adapter, state.seed, number + 1)
        return replace(state.updated(fresh.lora, dense), folds=state.folds.push(AdapterState(lora=fold)))


def energy_rank(singular_values: Tensor, tau: float) -> int:
    """The smallest k, at least 1, with `sum_(i<=k) S_i^2 >= tau sum_i S_i^2`.

    Args:
        singular_values: S in descending order.
        tau: the share of the energy, in (0, 1].
    """
    energy = singular_values.square().cumsum(dim=0)
    return min(int((energy < tau * energy[-1]).sum()) + 1, len(energy))
