"""FedEx-LoRA: the mean factors, and what they miss folded into the base."""

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
    """`A = sum_k p_k s_k A_k`, `B = sum_k p_k B_k`, and the fold `sum_k p_k s_k B_k A_k - B A`: together, the ideal.

    Singhal et al. 2024, "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Foundation
    Models", https://arxiv.org/abs/2410.09432. Differences: means are weighted by examples; the residual is kept as
    factors, the stack of all replies and of the negated mean, beside a base that may be quantized; scalings are
    folded into A_k, and unequal ranks zero-padded. What a smaller client's slice of the mean leaves out is then
    missing from its next update.
    Memory: the factors of all replies.
    """

    steady: ClassVar[bool] = True

    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate], round: int) -> ServerState:
        """The means, and the residual as one more fold; what no reply has stays as it was."""
        parts, dense = gather(updates, round)
        lora, residuals = dict[str, LoraFactors](), dict[str, LoraFactors]()
        for name, part in parts.items():
            mean = padded_mean(part.factors, part.shares)
            before = state.adapter.lora.get(name, mean)
            held = first_ranks(mean, mean.rank, before.scaling)
            # against the mean as it is held and sent, so that its rounding is in the residual as well
            residuals[name] = stack([*part.factors, held], [*part.shares, -1.0])
            lora[name] = with_rank_restored(held, before)
        return replace(state.updated(lora, dense), folds=state.folds.push(AdapterState(lora=residuals)))
