"""Rank-wise averaging: the mean of each row of A and column of B is taken over the clients that have it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from fedlora.exchange import ClientUpdate

from ..base import ServerState, Strategy
from ..tools.averaging import row_means


@dataclass(frozen=True)
class RbLora(Strategy):
    """`A[j] = sum_k n_k s_k A_k[j] / sum_k n_k`, with both sums over the clients with r_k > j; columns of B likewise.

    Chen et al. 2024, "RBLA: Rank-Based-LoRA-Aggregation for Fine-tuning Heterogeneous Models in FLaaS",
    https://arxiv.org/abs/2408.08699. Wu et al. 2026, https://arxiv.org/abs/2602.13486, show why the weights must
    depend on the rank: with one weight per client, rows that only clients of large ranks have shrink by a constant
    factor in every round. Here A_k is multiplied by the client's scaling, and a row that no reply of the round contains
    keeps its value.
    Memory: one reply, since each is added to the means when it arrives.
    """

    linear: ClassVar[bool] = True
    steady: ClassVar[bool] = True
    any_kind: ClassVar[bool] = True

    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate], number: int) -> ServerState:
        """The row-wise means. A module, row or tensor that no reply contains keeps its value."""
        return row_means(state, updates, number)
