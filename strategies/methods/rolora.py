"""RoLoRA: rounds train B and A in turn, so that the mean of the trained factor gives the ideal exactly."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from fedlora.exchange import Broadcast, ClientInfo, ClientUpdate, Plan

from ..base import ServerState, Strategy
from ..tools.averaging import averaged


@dataclass(frozen=True)
class RoLora(Strategy):
    """Rounds 1, 3, ... train B with one A for all, `B = sum_k p_k B_k`; rounds 2, 4, ... train A with one B for all.

    Chen et al. 2024, "Robust Federated Finetuning of Foundation Models via Alternating Minimization of LoRA",
    https://arxiv.org/abs/2409.02346. B is trained first, since A has no gradient while B = 0. Here ranks may differ:
    rows that a client lacks count as zeros, and A is the mean of `s_k A_k`, divided by the server's own scaling.
    Memory: one reply. Cost: O(K d r).
    """

    linear: ClassVar[bool] = True
    of_mean: ClassVar[bool] = True
    steady: ClassVar[bool] = True

    def broadcast(self, state: ServerState, client: ClientInfo, number: int) -> Broadcast:
        """Both factors. Clients train and send back only the factor of this round."""
        factor = frozenset(trained_in(number))
        return replace(super().broadcast(state, client, number), plan=Plan(factor, factor))

    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate], number: int) -> ServerState:
        """The mean of the trained factor. A module or tensor that no reply contains keeps its value."""
        return averaged(state, updates, number, trained_in(number))


def trained_in(number: int) -> Literal["A", "B"]:
    """The factor that a round trains: B in rounds 1, 3, …, and A in rounds 2, 4, …"""
    return "B" if number % 2 else "A"
