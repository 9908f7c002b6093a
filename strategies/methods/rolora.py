"""RoLoRA: rounds train B and A in turn, so that the mean of the trained factor is exact."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from fedlora.exchange import Broadcast, ClientInfo, ClientUpdate, Plan

from ..base import ServerState, Strategy
from ..tools.averaging import averaged


@dataclass(frozen=True)
class RoLora(Strategy):
    """Rounds 1, 3, ... train B on a common A: `B = sum_k p_k B_k`; rounds 2, 4, ... A on a common B.

    Chen et al. 2024, "Robust Federated Finetuning of Foundation Models via Alternating Minimization of LoRA",
    https://arxiv.org/abs/2409.02346. B comes first: while B = 0, A has no gradient. Here ranks may differ: rows that
    a client lacks count as zeros, and A is the mean of `s_k A_k` over the server's own scaling.
    Memory: one reply. Cost: O(K d r).
    """

    linear: ClassVar[bool] = True
    steady: ClassVar[bool] = True

    def broadcast(self, state: ServerState, client: ClientInfo, round: int) -> Broadcast:
        """Both factors; the round's own is trained and sent back."""
        factor = frozenset(trained_in(round))
        return replace(super().broadcast(state, client, round), plan=Plan(factor, factor))

    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate], round: int) -> ServerState:
        """The mean of the trained factor; a module or dense tensor that no reply has stays as it was."""
        return averaged(state, updates, round, trained_in(round))


def trained_in(round: int) -> Literal["A", "B"]:
    """The factor that a round trains: B in the first."""
    return "B" if round % 2 else "A"
