"""FedEx-LoRA: the mean factors, and a fold with the difference between their product and the ideal."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

from fedlora.adapters import AdapterState, LoraFactors, first_ranks, stack
from fedlora.exchange import ClientUpdate

from ..base import ServerState, Strategy
from ..tools.averaging import padded_mean, with_rank_restored
from ..tools.replies import gather


@dataclass(frozen=True)
class FedEx(Strategy):
    """`A = sum_k p_k s_k A_k`, `B = sum_k p_k B_k`, and the fold `sum_k p_k s_k B_k A_k - B A`; their sum is the ideal.

    Singhal et al. 2024, "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Foundation
    Models", https://arxiv.org/abs/2410.09432. Differences from the paper: means are weighted by numbers of examples.
    The residual, which is the fold above, is kept as factors beside the base, so that the base may be quantized: they
    are the stacked factors of all replies and of the negated mean. A_k is multiplied by the client's scaling, and
    smaller ranks are padded with zeros. A client of a smaller rank starts from a slice of the mean; the rest of the
    mean is missing from its next update.
    Memory: the factors of all replies.
    """

    of_ideal: ClassVar[bool] = True
    needs_means: ClassVar[bool] = True
    steady: ClassVar[bool] = True

    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate], number: int) -> ServerState:
        """The means, and the residual as one more fold. A module or tensor that no reply contains keeps its value."""
        parts, dense = gather(updates, number)
        lora, residuals = dict[str, LoraFactors](), dict[str, LoraFactors]()
        for name, part in parts.items():
            mean = (part.summed and part.summed.mean) or padded_mean(part.factors, part.shares)
            before = state.adapter.lora.get(name, mean)
            held = first_ranks(mean, mean.rank, before.scaling)
            # the residual against the mean as it is stored and sent, so that it makes up for rounding as well
            residuals[name] = stack([*part.factors, held], [*part.shares, -1.0])
            lora[name] = with_rank_restored(held, before)
        return replace(state.updated(lora, dense), folds=state.folds.push(AdapterState(lora=residuals)))
