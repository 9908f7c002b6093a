"""FRLoRA: every round starts from the weight's leading components, and what it changed becomes a fold."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

from fedlora.adapters import AdapterState, stack
from fedlora.exchange import Broadcast, ClientInfo, ClientUpdate

from ..base import ServerState
from ..tools.one_rank import OneRank, checked, factor_means


@dataclass(frozen=True)
class FrLora(OneRank):
    """Folds `s (B A - B_0 A_0)`, where A and B are the clients' means, and starts again from B_0 and A_0.

    Experimental: Yan et al. 2025, "Federated Residual Low-Rank Adaption of Large Language Models" (FRLoRA),
    https://openreview.net/forum?id=e0rQRMUhs7, is known here from its abstract and what the authors' code does.
    `s B_0 A_0` is the best approximation of the weight W of rank r, as `lora.init = pissa` makes it, and the first fold
    is `-s B_0 A_0`, so that the run starts at the base model. The server's adapter stays at B_0 and A_0; what is
    learned is in the folds, whose sum may have any rank. Differences from the authors' code: means are weighted by
    examples; W is not changed, and is the dequantized one of a quantized base. The product of the means is not the mean
    of the products. Every client needs the same rank and scaling.
    Memory: one reply, and a fold of rank 2r for each round until folds are combined.
    """

    method: ClassVar[str] = "frlora"
    starts_with: ClassVar[str] = "pissa"
    of_mean: ClassVar[bool] = True

    def broadcast(self, state: ServerState, client: ClientInfo, number: int) -> Broadcast:
        """B_0 and A_0, and the folds that this client lacks.

        Raises:
            StrategyError: the client's rank differs from the server's.
        """
        sent = super().broadcast(state, client, number)
        return replace(sent, plan=replace(sent.plan, begun=number, span=1))

    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate], number: int) -> ServerState:
        """The change of the mean factors' product as one more fold, of rank 2r, with the same adapter.

        Raises:
            StrategyError: a reply's rank differs from the server's, or its scaling from that of the first reply.
        """
        start = state.adapter.lora
        means, dense = factor_means(checked(updates, number, start, self.method))
        change = {name: stack([mean, start[name]], [1.0, -1.0]) for name, mean in means.items()}
        return replace(state.updated({}, dense), folds=state.folds.push(AdapterState(lora=change)))
