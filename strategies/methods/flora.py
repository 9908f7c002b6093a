"""FLoRA: the stack of all replies is folded into the base, and the adapter restarts."""

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
    Adaptations", https://arxiv.org/abs/2409.05976, Algorithm 1. Here the scale is folded in as well, and
    the fold is kept as a frozen adapter beside the base, which may be quantized, rather than added to its weights.
    Memory: the factors of all replies.

    Args:
        seed: of the restarts; a run's round loop sets it to the run's seed.
        max_rank: the largest rank of the accumulated folds; 0: min(d_out, d_in), where nothing is lost.
        compact: False keeps every fold as it came, for clients that merge folds into an fp32 base.
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
            StrategyError: the client's rank exceeds the largest of the run.
        """
        return super().broadcast(unscaled(state, client), client, round)

    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate], round: int) -> ServerState:
        """The stack as one more fold, and the next round's restart."""
        parts, dense = gather(updates, round)
        fold = AdapterState(lora={name: stack(p.factors, p.shares) for name, p in parts.items()})
        adapter = AdapterState(
            lora=restart(state.adapter, self.seed, round + 1).lora, tensors={**state.adapter.tensors, **dense}
        )
        return replace(state, adapter=adapter, folds=state.folds.push(fold, self.max_rank, self.compact))
