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
    Heterogeneous Low-Rank Adaptations", https://arxiv.org/abs/2409.05976. The result lacks what `fedavg`'s lacks, and
    the zeros also shrink each row that some clients do not have. If clients with a share p of the examples have the
    row, A and B are both multiplied by p, and their product by p^2. Here A_k is multiplied by the client's scaling
    before the mean, so that clients with unequal scalings are averaged by their updates.
    Memory: one reply, since each is added to the means when it arrives.
    """

    linear: ClassVar[bool] = True
    of_mean: ClassVar[bool] = True
    steady: ClassVar[bool] = True
    any_kind: ClassVar[bool] = True

    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate], number: int) -> ServerState:
        """The padded means. A module or tensor that no reply contains keeps its value."""
        means, dense = effective_means(updates, number, zero_pad=True)
        lora = dict[str, LoraFactors]()
        for name, factors in means.items():
            before = state.adapter.lora.get(name, factors)
            lora[name] = with_rank_restored(first_ranks(factors, factors.rank, before.scaling), before)
        return state.updated(lora, dense)
