"""FLoRA: the stack of all replies is folded into the base, and the adapter restarts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from fedlora.adapters import AdapterState, stack
from fedlora.exchange import Broadcast, ClientInfo, ClientUpdate

from ..base import ServerState, Strategy
from ..tools.replies import gather
from ..tools.restarts import restart, unscaled


@dataclass(frozen=True)
class Flora(Strategy):
    """Folds `B = [B_1|...|B_K]`, `A = [p_1 s_1 A_1; ...; p_K s_K A_K]`: the product is `sum_k p_k s_k B_k A_k`.

    Wang et al. 2024, "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank
    Adaptations", https://arxiv.org/abs/2409.05976, Algorithm 1. Here the scale is folded in as well, and
    the fold is kept as a frozen adapter beside the base, which may be quantized, rather than added to its weights.
    Memory: the factors of all replies.
    """

    def broadcast(self, state: ServerState, client: ClientInfo, round: int) -> Broadcast:
        """The first r_j rows of the round's random A with B = 0, and the folds that this client lacks.

        Raises:
            StrategyError: the client's rank exceeds the largest of the run.
        """
        return super().broadcast(unscaled(state, client), client, round)

    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate], round: int) -> ServerState:
        """The stack as one more fold, and the next round's restart."""
        parts, dense = gather(updates, round)
        fold = AdapterState(lora={name: stack(p.factors, p.shares) for name, p in parts.items()})
        fresh = restart(state.adapter, state.seed, round + 1)
        return replace(state.updated(fresh.lora, dense), folds=state.folds.push(fold))
