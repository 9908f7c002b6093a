"""FLoRA: the stacked factors of all replies become a fold, and the adapter starts anew."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from fedlora.adapters import AdapterState, stack
from fedlora.common.errors import StrategyError
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

    Args:
        seed: seed of the new A after each round; a run sets it to the run's seed.
        max_rank: the largest rank of all folds together; 0: min(d_out, d_in), which loses nothing.
        compact: whether folds beyond that rank are combined into one; False if clients merge folds into an fp32 base.
    """

    seed: int = 0
    max_rank: int = 0
    compact: bool = True

    def __post_init__(self) -> None:
        if self.max_rank < 0:
            raise StrategyError(f"strategy.options: flora's max_rank = {self.max_rank}, expected 0 (no limit) or more")

    def broadcast(self, state: ServerState, client: ClientInfo, round: int) -> Broadcast:
        """The first r_j rows of the round's random A with B = 0, and the folds that this client lacks.

        Raises:
            StrategyError: the client's rank is larger than the server's.
        """
        return super().broadcast(unscaled(state, client), client, round)

    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate], round: int) -> ServerState:
        """The stacked replies as one more fold, and a new adapter for the next round."""
        parts, dense = gather(updates, round)
        fold = AdapterState(lora={name: stack(p.factors, p.shares) for name, p in parts.items()})
        adapter = AdapterState(
            lora=restart(state.adapter, self.seed, round + 1).lora, tensors={**state.adapter.tensors, **dense}
        )
        return replace(state, adapter=adapter, folds=state.folds.push(fold, self.max_rank, self.compact))
