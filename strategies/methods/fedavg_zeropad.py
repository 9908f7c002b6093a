"""FedAvg over factors of unequal ranks, filled up with zeros to the largest."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from fedlora.adapters import LoraFactors, first_ranks
from fedlora.exchange import ClientUpdate

from ..base import ServerState, Strategy
from ..tools.averaging import effective_means, with_rank_restored


@dataclass(frozen=True)
class FedAvgZeropad(Strategy):
    """`A = sum_k p_k pad(s_k A_k)`, `B = sum_k p_k pad(B_k)`, with zeros in the rows and columns that client k lacks.

    The baseline for unequal ranks in Wang et al. 2024, "FLoRA: Federated Fine-Tuning Large Language Models with
    Heterogeneous Low-Rank Adaptations", https://arxiv.org/abs/2409.05976. Besides what `fedavg` misses, the zeros
    shrink every row that not all clients have, in A and in B: its product with the square of the share that has it.
    Here A_k carries the client's scaling, so that unequal scalings are averaged as the updates they stand for.
    Means run as replies arrive, so memory is that of one reply.
    """

    linear: ClassVar[bool] = True
    steady: ClassVar[bool] = True
    any_kind: ClassVar[bool] = True

    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate], round: int) -> ServerState:
        """The padded means; a module or dense tensor that no reply has stays as it was."""
        means, dense = effective_means(updates, round, zero_pad=True)
        lora = dict[str, LoraFactors]()
        for name, factors in means.items():
            before = state.adapter.lora.get(name, factors)
            lora[name] = with_rank_restored(first_ranks(factors, factors.rank, before.scaling), before)
        return state.updated(lora, dense)
