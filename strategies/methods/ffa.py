"""FFA-LoRA: A is drawn once and frozen, so that the mean of the B_k is exact."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedlora.adapters import AdapterState, LoraFactors
from fedlora.adapters.means import Means, RankMeans
from fedlora.exchange import Broadcast, ClientInfo, ClientUpdate

from ..base import ServerState, Strategy
from ..tools.replies import arrivals
from .fedavg_zeropad import at_scaling


@dataclass(frozen=True)
class Ffa(Strategy):
    """`B = sum_k p_k B_k` with one A for all, never trained: `B A` is the mean of the updates.

    Sun et al. 2024, "Improving LoRA in Privacy-preserving Federated Learning", https://arxiv.org/abs/2403.12313.
    Here ranks may differ: client k holds the first r_k rows of A, with the scale in them, so that its B_k filled up
    with zero columns counts in the mean as it is. A comes with every broadcast; it is the run's seeded one.
    Memory: one reply. Cost: O(K d_out r).
    """

    linear: ClassVar[bool] = True
    steady: ClassVar[bool] = True

    def broadcast(self, state: ServerState, client: ClientInfo, round: int) -> Broadcast:
        """A and the mean B; only B is trained and sent back."""
        return replace(super().broadcast(state, client, round), trainable=frozenset("B"), upload=frozenset("B"))

    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate], round: int) -> ServerState:
        """The mean B; a module or dense tensor that no reply has stays as it was."""
        return averaged(state, updates, round, "B")


def averaged(state: ServerState, updates: Iterable[ClientUpdate], round: int, factor: Literal["A", "B"]) -> ServerState:
    """The state with one factor replaced by its mean over clients that hold the other in common, which is exact.

    Ranks below the largest are filled up with zeros, and the scales are taken into A.

    Args:
        state: that the round started from.
        updates: with this factor at least.
        round: for messages.
        factor: the one that was trained.
    """
    means, dense = RankMeans(0 if factor == "A" else 1, zero_pad=True), Means()
    for update in arrivals(updates, round):
        lora, server = update.adapter.lora, state.adapter.lora
        if factor == "A":
            means.add(
                {name: at_scaling(f, server[name].scaling) for name, f in lora.items()},
                update.num_examples,
                update.client_id,
            )
        else:
            means.add({name: f.B for name, f in lora.items()}, update.num_examples, update.client_id)
        dense.add(update.adapter.tensors, update.num_examples, update.client_id)
    lora = {name: _replaced(state.adapter.lora[name], factor, mean) for name, mean in means.values().items()}
    adapter = AdapterState(lora={**state.adapter.lora, **lora}, tensors={**state.adapter.tensors, **dense.values})
    return replace(state, adapter=adapter)


def _replaced(before: LoraFactors, factor: Literal["A", "B"], mean: Tensor) -> LoraFactors:
    """The factors with a new A or B, with zeros where the mean has fewer ranks than the server.

    A row that would be zero in both factors has no gradient and would stay so for good; it keeps what it was,
    which adds nothing while the other factor is zero.
    """
    axis = 0 if factor == "A" else 1
    missing = before.rank - mean.shape[axis]
    if missing:
        old = (before.A if factor == "A" else before.B).narrow(axis, mean.shape[axis], missing).to(mean)
        other = (before.B if factor == "A" else before.A).narrow(1 - axis, mean.shape[axis], missing)
        alive = other.any(dim=axis).unsqueeze(1 - axis)
        mean = torch.cat([mean, torch.where(alive, torch.zeros_like(old), old)], dim=axis)
    return replace(before, A=mean) if factor == "A" else replace(before, B=mean)
