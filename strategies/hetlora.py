"""HetLoRA: zero-padded means, weighted by the norms of the clients' updates."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fedlora.adapter import AdapterState, LoraFactors, first_ranks, norm
from fedlora.errors import StrategyError
from fedlora.exchange import Broadcast, ClientInfo, ClientUpdate

from .base import ServerState, Strategy, regrown
from .fedavg_zeropad import padded_mean
from .means import gather

_RANKS = "hetlora.ranks"  # client id -> the share of its rank that pruning has left


@dataclass(frozen=True)
class HetLora(Strategy):
    """`A = sum_k w_k pad(s_k A_k)`, `B = sum_k w_k pad(B_k)`, with `w_k = |dW_k|_F / sum_j |dW_j|_F` by module.

    Cho et al. 2024, "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models" (HetLoRA),
    https://arxiv.org/abs/2401.06432: zero-padding, sparsity-weighted aggregation, truncation and rank self-pruning.
    The numbers of examples do not count. Differences: norms are those of s_k B_k A_k, from Gram matrices instead of
    the products; A_k carries the client's scaling.

    Pruning: with `prune_gamma` = g, rows from ceil(g r_k) on are client k's tail. The trainer shrinks
    `sum |B tail|_F |A tail|_F` over the modules (`lora.prune-weight`); where it ended below what the client was sent,
    the tail is dropped from the reply, and the client gets ceil(g r_k) rows from then on. The decision is made here,
    on the numbers that the client would use, so that its rank is part of the server's state; the paper's client
    makes it, and saves one upload of the tail.
    Memory: the factors of all replies. Cost: O(K d r^2).

    Args:
        prune_gamma: the share of its rank that a client keeps when it is pruned, below 1; 0: never. A run sets it
            to `lora.prune-gamma`, which the clients know too.
    """

    prune_gamma: float = 0.0

    steady: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.prune_gamma < 1:
            raise StrategyError(
                f"strategy.options: hetlora's prune_gamma = {self.prune_gamma}, expected 0 (never) or a share below 1"
            )

    def broadcast(self, state: ServerState, client: ClientInfo, round: int) -> Broadcast:
        """The padded means, cut to the rank that pruning has left the client.

        Raises:
            StrategyError: the client's rank exceeds the largest of the run.
        """
        left = _left(state, client.client_id)
        if left < 1:
            pattern = {module: math.ceil(left * rank) for module, rank in client.rank_pattern.items()}
            client = replace(client, rank=math.ceil(left * client.rank), rank_pattern=pattern)
        return super().broadcast(state, client, round)

    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate], round: int) -> ServerState:
        """The padded means, with equal weights where no update moved; what no reply has stays as it was."""
        left = dict(state.memory.get(_RANKS, AdapterState()).dense)
        parts, dense = gather((self._pruned(update, state, left) for update in updates), round)
        lora = dict(state.adapter.lora)
        for name, part in parts.items():
            norms = [norm(factors) for factors in part.factors]
            weights = [size / sum(norms) for size in norms] if any(norms) else [1 / len(norms)] * len(norms)
            mean = padded_mean(part.factors, weights)
            before = lora.get(name, mean)
            lora[name] = regrown(first_ranks(mean, mean.rank, before.scaling), before)
        memory = {**state.memory, _RANKS: AdapterState(dense=left)} if left else state.memory
        adapter = AdapterState(lora=lora, dense={**state.adapter.dense, **dense})
        return replace(state, adapter=adapter, memory=memory)

    def _pruned(self, update: ClientUpdate, state: ServerState, left: dict[str, Tensor]) -> ClientUpdate:
        """The reply without its tail, where that shrank; notes it in `left`."""
        if not self.prune_gamma:
            return update
        keep = {name: max(1, math.ceil(self.prune_gamma * f.rank)) for name, f in update.adapter.lora.items()}
        before = after = 0.0
        for name, f in update.adapter.lora.items():
            after += _tail(f, keep[name])
            before += _tail(first_ranks(state.adapter.lora[name], f.rank, f.scaling), keep[name])
        if after >= before:
            return update
        now = _left(state, update.client_id) * self.prune_gamma
        left[str(update.client_id)] = torch.tensor(now, dtype=torch.float64)
        lora = {
            name: LoraFactors(A=f.A[: keep[name]], B=f.B[:, : keep[name]], scaling=f.scaling)
            for name, f in update.adapter.lora.items()
        }
        return replace(update, adapter=replace(update.adapter, lora=lora))


def _left(state: ServerState, client_id: int) -> float:
    """The share of its rank that pruning has left a client."""
    share = state.memory.get(_RANKS, AdapterState()).dense.get(str(client_id))
    return 1.0 if share is None else float(share)


def _tail(factors: LoraFactors, keep: int) -> float:
    """`|B tail|_F |A tail|_F`, the tail being what lies beyond the first `keep` rows."""
    return float(factors.B[:, keep:].double().norm() * factors.A[keep:].double().norm())
