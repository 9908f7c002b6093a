"""FFA-LoRA: A is drawn once and frozen, so that the mean of the B_k gives the mean of the updates exactly."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

from fedlora.exchange import Broadcast, ClientInfo, ClientUpdate, Plan

from ..base import ServerState, Strategy
from ..tools.averaging import averaged


@dataclass(frozen=True)
class Ffa(Strategy):
    """`B = sum_k p_k B_k` with one A for all, which is never trained; `B A` is then the mean of the updates.

    Sun et al. 2024, "Improving LoRA in Privacy-preserving Federated Learning", https://arxiv.org/abs/2403.12313.
    Here ranks may differ: client k holds the first r_k rows of A, times the server's scaling over its own. Its B_k then
    needs only zero columns to enter the mean. A is drawn with the run's seed and sent in every broadcast.
    Memory: one reply. Cost: O(K d_out r).
    """

    linear: ClassVar[bool] = True
    of_mean: ClassVar[bool] = True
    steady: ClassVar[bool] = True

    def broadcast(self, state: ServerState, client: ClientInfo, number: int) -> Broadcast:
        """A and the mean B. Clients train and send back only B."""
        return replace(super().broadcast(state, client, number), plan=Plan(frozenset("B"), frozenset("B")))

    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate], number: int) -> ServerState:
        """The mean B. A module or tensor that no reply contains keeps its value."""
        return averaged(state, updates, number, "B")
