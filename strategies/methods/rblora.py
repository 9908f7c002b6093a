"""Rank-wise averaging: each row of A and column of B over the clients that have it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch

from fedlora.adapters import LoraFactors, first_ranks
from fedlora.exchange import ClientUpdate

from ..base import ServerState, Strategy
from ..tools.averaging import effective_means


@dataclass(frozen=True)
class RbLora(Strategy):
    """`A[j] = sum_k n_k s_k A_k[j] / sum_k n_k`, both sums over the clients with r_k > j; columns of B likewise.

    Chen et al. 2024, "RBLA: Rank-Based-LoRA-Aggregation for Fine-tuning Heterogeneous Models in FLaaS",
    https://arxiv.org/abs/2408.08699. Wu et al. 2026, https://arxiv.org/abs/2602.13486, show why the weights must
    depend on the rank: with one weight per client, what only the large ranks hold shrinks geometrically. Here A_k
    carries the client's scaling, and rows that no reply of the round has stay as they were.
    Means run as replies arrive, so memory is that of one reply.
    """

    linear: ClassVar[bool] = True
    steady: ClassVar[bool] = True
    any_kind: ClassVar[bool] = True

    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate], round: int) -> ServerState:
        """The row-wise means; a module, row or dense tensor that no reply has stays as it was."""
        means, dense = effective_means(updates, round, zero_pad=False)
        lora = dict[str, LoraFactors]()
        for name, factors in means.items():
            before = state.adapter.lora.get(name, factors)
            new = first_ranks(factors, factors.rank, before.scaling)
            lora[name] = LoraFactors(
                A=torch.cat([new.A, before.A[new.rank :].to(new.A)]),
                B=torch.cat([new.B, before.B[:, new.rank :].to(new.B)], dim=1),
                scaling=before.scaling,
            )
        return state.updated(lora, dense)
