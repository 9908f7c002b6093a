"""FedSA-LoRA: clients share A, and each keeps its own B."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fedlora.adapters import LoraFactors
from fedlora.adapters.means import Means, RankMeans
from fedlora.exchange import Broadcast, ClientInfo, ClientUpdate

from ..base import ServerState, Strategy
from ..tools.averaging import at_scaling
from ..tools.replies import arrivals


@dataclass(frozen=True)
class FedSa(Strategy):
    """`s A = sum_k p_k s_k A_k`. Clients train both factors and send only A; client k continues from its own B_k.

    Guo et al. 2024, "Selective Aggregation for Low-Rank Adaptation in Federated Learning",
    https://arxiv.org/abs/2410.01463. Here ranks may differ: row j of A is the mean over the clients that have it.
    The server never gets a B. Its adapter has B = 0, so that only the clients can evaluate the trained model.
    Memory: one reply. Cost: O(K d_in r).
    """

    linear: ClassVar[bool] = True
    steady: ClassVar[bool] = True
    personal: ClassVar[frozenset[str]] = frozenset("B")

    def broadcast(self, state: ServerState, client: ClientInfo, number: int) -> Broadcast:
        """The mean A, with B = 0 for clients that have no B of their own yet. Clients send back only A."""
        sent = super().broadcast(state, client, number)
        return replace(sent, plan=replace(sent.plan, send=frozenset("A")))

    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate], number: int) -> ServerState:
        """The mean of each row of A. A row, module or tensor that no reply contains keeps its value."""
        means, dense = RankMeans(0, zero_pad=False), Means()
        for update in arrivals(updates, number):
            server = state.adapter.lora
            means.add(
                {name: at_scaling(f, server[name].scaling) for name, f in update.adapter.lora.items()},
                update.num_examples,
                update.client_id,
            )
            dense.add(update.adapter.tensors, update.num_examples, update.client_id)
        lora = dict[str, LoraFactors]()
        for name, rows in means.values().items():
            before = state.adapter.lora[name]
            lora[name] = replace(before, A=torch.cat([rows, before.A[len(rows) :].to(rows)]))
        return state.updated(lora, dense.values)
