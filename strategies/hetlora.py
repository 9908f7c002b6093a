"""HetLoRA: zero-padded means, weighted by the norms of the clients' updates."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

from fedlora.adapter import AdapterState, first_ranks, norm
from fedlora.exchange import ClientUpdate

from .base import ServerState, Strategy, regrown
from .fedavg_zeropad import padded_mean
from .means import gather


@dataclass(frozen=True)
class HetLora(Strategy):
    """`A = sum_k w_k pad(s_k A_k)`, `B = sum_k w_k pad(B_k)`, with `w_k = |dW_k|_F / sum_j |dW_j|_F` by module.

    Cho et al. 2024, "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models" (HetLoRA),
    https://arxiv.org/abs/2401.06432: zero-padding, sparsity-weighted aggregation and truncation. The numbers of
    examples do not count. Differences: norms are those of s_k B_k A_k, from Gram matrices instead of the products;
    A_k carries the client's scaling; the clients' ranks are fixed, where the paper also lets clients prune theirs.
    Memory: the factors of all replies. Cost: O(K d r^2).
    """

    steady: ClassVar[bool] = True

    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate], round: int) -> ServerState:
        """The padded means, with equal weights where no update moved; what no reply has stays as it was."""
        parts, dense = gather(updates, round)
        lora = dict(state.adapter.lora)
        for name, part in parts.items():
            norms = [norm(factors) for factors in part.factors]
            weights = [size / sum(norms) for size in norms] if any(norms) else [1 / len(norms)] * len(norms)
            mean = padded_mean(part.factors, weights)
            before = lora.get(name, mean)
            lora[name] = regrown(first_ranks(mean, mean.rank, before.scaling), before)
        return replace(state, adapter=AdapterState(lora=lora, dense={**state.adapter.dense, **dense}))
