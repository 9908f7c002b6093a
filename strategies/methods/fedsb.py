"""Fed-SB: A and B are fixed before round 1, and only the core R between them is trained."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from fedlora.adapters.means import Means
from fedlora.exchange import Broadcast, ClientInfo, ClientUpdate, Plan

from ..base import ServerState, Strategy
from ..tools.replies import arrivals


@dataclass(frozen=True)
class FedSb(Strategy):
    """`dW = B R A` with fixed B and A, and `R = sum_k p_k R_k`, which is exactly the mean of the updates.

    Singhal et al. 2025, "Fed-SB: A Silver Bullet for Extreme Communication Efficiency and Performance in (Private)
    Federated LoRA Fine-Tuning", https://arxiv.org/abs/2502.15436. It starts as LoRA-SB does; `initializers/lora_sb.py`
    explains round 0 and the differences from the paper. Or it starts from the base model's weights
    (`initializers/lora_xs.py`), which tells nothing of the clients' rows. Ranks may differ: client k trains the upper
    left r_k x r_k block of R, and what it lacks counts as zero.
    Memory: one reply. Cost: O(K r^2).
    """

    linear: ClassVar[bool] = True
    of_mean: ClassVar[bool] = True
    steady: ClassVar[bool] = True
    starts_with: ClassVar[str] = "lora-sb"
    cores: ClassVar[bool] = True

    def broadcast(self, state: ServerState, client: ClientInfo, number: int) -> Broadcast:
        """A, B and the client's block of R. The client trains and sends back only R."""
        sent = super().broadcast(state, client, number)
        return replace(sent, plan=Plan(frozenset("R"), frozenset("R")))

    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate], number: int) -> ServerState:
        """The mean R. Smaller blocks are filled up with zeros."""
        cores, tensors = Means(), Means()
        for update in arrivals(updates, number):
            sent = {name: f.R for name, f in update.adapter.lora.items() if f.R is not None}
            whole = {name: _filled(R, state.adapter.lora[name].rank) for name, R in sent.items()}
            cores.add(whole, update.num_examples, update.client_id)
            tensors.add(update.adapter.tensors, update.num_examples, update.client_id)
        lora = {name: replace(f, R=cores.values.get(name, f.R)) for name, f in state.adapter.lora.items()}
        return state.updated(lora, tensors.values)


def _filled(block: Tensor, rank: int) -> Tensor:
    """A matrix of zeros, [rank, rank], with the block in its upper left corner."""
    extra = rank - len(block)
    return F.pad(block, (0, extra, 0, extra))
