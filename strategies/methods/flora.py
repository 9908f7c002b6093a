"""FLoRA: the stacked factors of all replies become a fold, and the adapter starts anew."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

from fedlora.adapters import AdapterState, stack
from fedlora.exchange import Broadcast, ClientInfo, ClientUpdate

from ..base import ServerState, Strategy
from ..tools.replies import gather
from ..tools.restarts import restart, unscaled


@dataclass(frozen=True)
class Flora(Strategy):
    """Folds `B = [B_1|...|B_K]`, `A = [p_1 s_1 A_1; ...; p_K s_K A_K]`: the product is `sum_k p_k s_k B_k A_k`.

    Wang et al. 2024, "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank
    Adaptations", https://arxiv.org/abs/2409.05976, Algorithm 1. Differences from the paper: A_k is multiplied by the
    client's scaling. The fold is not added to the base model's weights, but kept as a frozen adapter beside them, so
    that the base may be quantized.
    Memory: the factors of all replies.
    """

    of_ideal: ClassVar[bool] = True
    anew: ClassVar[bool] = True

    def broadcast(self, state: ServerState, client: ClientInfo, number: int) -> Broadcast:
        """The first r_j rows of the round's random A with B = 0, and the folds that this client lacks.

        Raises:
            StrategyError: the client's rank is larger than the server's.
        """
        sent = super().broadcast(unscaled(state, client), client, number)
        return replace(sent, plan=replace(sent.plan, begun=number, span=1))

    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate], number: int) -> ServerState:
        """The stacked replies as one more fold, and a new adapter for the next round."""
        parts, dense = gather(updates, number)
        fold = AdapterState(lora={name: stack(p.factors, p.shares) for name, p in parts.items()})
        fresh = restart(state.adapter, state.seed, number + 1)
        return replace(state.updated(fresh.lora, dense), folds=state.folds.push(fold))
