"""FFA-LoRA: A is drawn once and frozen, so that the mean of the B_k is exact."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

from fedlora.exchange import Broadcast, ClientInfo, ClientUpdate, Plan

from ..base import ServerState, Strategy
from ..tools.averaging import averaged


@dataclass(frozen=True)
class Ffa(Strategy):
    """`B = sum_k p_k B_k` with one A for all, never trained: `B A` is the mean of the updates.

    Sun et al. 2024, "Improving LoRA in Privacy-preserving Federated Learning", https://arxiv.org/abs/2403.12313.
    Here ranks may differ: client k holds the first r_k rows of A, with the scale in them, so that its B_k filled up
    with zero columns counts in the mean as it is. A comes with every broadcast; it is the run's seeded one.
    Memory: one reply. Cost: O(K d_out r).
    """

    linear: ClassVar[bool] = True
    steady: ClassVar[bool] = True

    def broadcast(self, state: ServerState, client: ClientInfo, round: int) -> Broadcast:
        """A and the mean B; only B is trained and sent back."""
        return replace(super().broadcast(state, client, round), plan=Plan(frozenset("B"), frozenset("B")))

    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate], round: int) -> ServerState:
        """The mean B; a module or dense tensor that no reply has stays as it was."""
        return averaged(state, updates, round, "B")
