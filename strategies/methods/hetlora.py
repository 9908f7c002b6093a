"""HetLoRA: zero-padded means, weighted by the norms of the clients' updates."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fedlora.adapters import AdapterState, LoraFactors, first_ranks, norm, pruned_rank
from fedlora.common.errors import StrategyError
from fedlora.exchange import Broadcast, ClientInfo, ClientUpdate, Term

from ..base import ServerState, Strategy
from ..tools.averaging import padded_mean, with_rank_restored
from ..tools.replies import gather

_PRUNED = "hetlora.pruned"  # client id -> number of times that the client's rank was lowered


@dataclass(frozen=True)
class HetLora(Strategy):
    """`A = sum_k w_k pad(s_k A_k)`, `B = sum_k w_k pad(B_k)`, with `w_k = |dW_k|_F / sum_j |dW_j|_F` by module.

    Cho et al. 2024, "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models" (HetLoRA),
    https://arxiv.org/abs/2401.06432: zero-padding, sparsity-weighted aggregation, truncation and rank self-pruning.
    Numbers of examples play no part. Differences from the paper: the norms are those of s_k B_k A_k, computed from Gram
    matrices instead of the products, and A_k is multiplied by the client's scaling.

    Pruning lowers a client's rank. With `prune_gamma` = g, the rows from ceil(g r) on are the tail of a client of rank
    r. The plan adds the term `prune_weight sum |B tail|_F |A tail|_F` over the modules to the client's loss, which
    shrinks the tail. If that sum is smaller in the client's reply than in what it was sent, the
    tail is dropped from the reply, and the client's rank is ceil(g r) from then on. In the paper the client decides
    this, and saves one upload of its tail. Here the server decides it from the same numbers, so that clients' ranks
    are part of the server's state.
    Memory: the factors of all replies. Cost: O(K d r^2).

    Args:
        prune_gamma: the share of its rank that a client keeps when it is pruned, below 1; 0: never.
        prune_weight: how strongly training shrinks the rows that may be pruned, at least 0.
    """

    prune_gamma: float = 0.0
    prune_weight: float = 1e-3

    steady: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.prune_gamma < 1:
            raise StrategyError(
                f"strategy.options: hetlora's prune_gamma = {self.prune_gamma}, expected 0 (never) or a share below 1"
            )
        if not 0 <= self.prune_weight < float("inf"):
            raise StrategyError(
                f"strategy.options: hetlora's prune_weight = {self.prune_weight}, expected a number of at least 0"
            )

    def check(self, clients: Sequence[ClientInfo]) -> None:
        """Check that pruning, if it is wanted, lowers at least one client's rank.

        Raises:
            StrategyError: rounding up leaves every client's rank as it is.
        """
        super().check(clients)
        ranks = {rank for client in clients for rank in client.every_rank}
        if self.prune_gamma and ranks and all(pruned_rank(rank, self.prune_gamma) == rank for rank in ranks):
            rank = max(ranks)
            raise StrategyError(
                f"strategy.options: hetlora's prune_gamma = {self.prune_gamma} prunes nobody: of rank {rank}, the "
                f"largest, ceil({self.prune_gamma} * {rank}) = {rank} rows stay; set it to at most "
                f"{math.floor(1000 * (rank - 1) / rank) / 1000}, or to 0"
            )

    def broadcast(self, state: ServerState, client: ClientInfo, number: int) -> Broadcast:
        """The padded means, cut to the client's rank after pruning, and the term that shrinks its tail.

        Raises:
            StrategyError: the client's rank is larger than the server's.
        """
        for _ in range(_times(state, client.client_id)):
            client = client.with_ranks(lambda rank: pruned_rank(rank, self.prune_gamma))
        sent = super().broadcast(state, client, number)
        if not (self.prune_gamma and self.prune_weight):
            return sent
        return replace(sent, plan=replace(sent.plan, terms=(Term("tail", self.prune_weight, self.prune_gamma),)))

    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate], number: int) -> ServerState:
        """The padded means. A module or tensor that no reply contains keeps its value.

        Where all updates of a module are zero, its weights are equal.
        """
        times = dict(state.memory.get(_PRUNED, AdapterState()).tensors)
        parts, dense = gather((self._pruned(update, state, times) for update in updates), number)
        lora = dict[str, LoraFactors]()
        for name, part in parts.items():
            norms = [norm(factors) for factors in part.factors]
            weights = [size / sum(norms) for size in norms] if any(norms) else [1 / len(norms)] * len(norms)
            mean = padded_mean(part.factors, weights)
            before = state.adapter.lora.get(name, mean)
            lora[name] = with_rank_restored(first_ranks(mean, mean.rank, before.scaling), before)
        memory = {**state.memory, _PRUNED: AdapterState(tensors=times)} if times else state.memory
        return replace(state.updated(lora, dense), memory=memory)

    def _pruned(self, update: ClientUpdate, state: ServerState, times: dict[str, Tensor]) -> ClientUpdate:
        """The reply, without its tail if the tail shrank, which is then counted in `times`."""
        if not self.prune_gamma:
            return update
        keep = {name: pruned_rank(f.rank, self.prune_gamma) for name, f in update.adapter.lora.items()}
        before = after = 0.0
        for name, f in update.adapter.lora.items():
            after += _tail(f, keep[name])
            before += _tail(first_ranks(state.adapter.lora[name], f.rank, f.scaling), keep[name])
        if after >= before:
            return update
        times[str(update.client_id)] = torch.tensor(_times(state, update.client_id) + 1)
        lora = {
            name: LoraFactors(A=f.A[: keep[name]], B=f.B[:, : keep[name]], scaling=f.scaling)
            for name, f in update.adapter.lora.items()
        }
        return replace(update, adapter=replace(update.adapter, lora=lora))


def _times(state: ServerState, client_id: int) -> int:
    """How many times a client's rank was lowered."""
    times = state.memory.get(_PRUNED, AdapterState()).tensors.get(str(client_id))
    return 0 if times is None else int(times)


def _tail(factors: LoraFactors, keep: int) -> float:
    """`|B tail|_F |A tail|_F`, where the tail is all rows of A and columns of B after the first `keep`."""
    return float(factors.B[:, keep:].double().norm() * factors.A[keep:].double().norm())
