"""Fed-SB: A and B are fixed to the leading directions of the first gradient, and only R between them is trained."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fedlora.adapters import AdapterState, LoraFactors, leading, pad, stack, svd_each
from fedlora.adapters.algebra import whole_svd
from fedlora.adapters.means import Means
from fedlora.common.errors import StrategyError
from fedlora.exchange import Broadcast, ClientInfo, ClientUpdate, Plan

from ..base import ServerState, Strategy
from ..tools.replies import arrivals, gather


@dataclass(frozen=True)
class FedSb(Strategy):
    """`dW = B R A` with fixed orthonormal B and A, and `R = sum_k p_k R_k`: the mean of the updates, exactly.

    Singhal et al. 2025, "Fed-SB: A Silver Bullet for Extreme Communication Efficiency and Performance in (Private)
    Federated LoRA Fine-Tuning", https://arxiv.org/abs/2502.15436, started as LoRA-SB does (Ponkshe et al. 2024,
    https://arxiv.org/abs/2411.19557). Round 0 asks every client for the leading singular directions of its gradient
    G_k. With `-sum_k p_k G_k = U S V'` cut to rank r, `B = U` and `A = V'` for good, and R starts at `c diag(S)`: of
    all first steps of its size and rank, the one along the gradient. Differences: LoRA-SB decomposes the sign of the
    mean gradient, which would need all of it, and not its directions alone; the size c comes from `first_step`; ranks
    may differ, client k training the leading r_k x r_k block of R. A module that no reply of round 0 has counts as one
    without a gradient: R starts at 0 between orthonormal directions that no client chose. The scaling is 1 whatever
    `lora.alpha` says, since B has unit columns and A unit rows.
    Memory: one reply, and in round 0 all replies. Cost: O(K r^2), and in round 0 O(d (K r)^2).

    Args:
        first_step: root of the mean square of the first update's entries; 1e-5, a usual learning rate of full
            fine-tuning, whose first Adam step moves every entry by that much. 0 starts at the base model.
    """

    first_step: float = 1e-5

    steady: ClassVar[bool] = True
    statistics: ClassVar[str] = "gradient"

    def __post_init__(self) -> None:
        if not 0 <= self.first_step < float("inf"):
            raise StrategyError(
                f"strategy.options: fedsb's first_step = {self.first_step}, expected a number of at least 0"
            )

    def broadcast(self, state: ServerState, client: ClientInfo, round: int) -> Broadcast:
        """A, B, and the client's block of R, which alone is trained and sent back; in round 0, the task "gradient"."""
        sent = super().broadcast(state, client, round)
        if round == 0:  # nothing of the factors but their shapes: the gradient is wanted at the base model
            lora = {
                name: LoraFactors(A=torch.zeros_like(f.A), B=torch.zeros_like(f.B), scaling=1.0)
                for name, f in sent.adapter.lora.items()
            }
            return replace(
                sent,
                adapter=replace(sent.adapter, lora=lora),
                plan=Plan(train=frozenset()),
                steady=False,  # a gradient continues nothing
                job=self.statistics,
            )
        return replace(sent, plan=Plan(frozenset("R"), frozenset("R")))

    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate], round: int) -> ServerState:
        """The mean R, smaller blocks filled up with zeros; in round 0 the fixed A and B and the first R."""
        if round == 0:
            return self._started(state, updates)
        cores, tensors = Means(), Means()
        for update in arrivals(updates, round):
            sent = {name: f.R for name, f in update.adapter.lora.items() if f.R is not None}
            whole = {name: _filled(R, state.adapter.lora[name].rank) for name, R in sent.items()}
            cores.add(whole, update.num_examples, update.client_id)
            tensors.add(update.adapter.tensors, update.num_examples, update.client_id)
        lora = {name: replace(f, R=cores.values.get(name, f.R)) for name, f in state.adapter.lora.items()}
        return replace(state, adapter=AdapterState(lora=lora, tensors={**state.adapter.tensors, **tensors.values}))

    def _started(self, state: ServerState, updates: Iterable[ClientUpdate]) -> ServerState:
        parts, _ = gather(updates, 0)
        lora = dict(state.adapter.lora)
        descent = {
            name: replace(stack(parts[name].factors, parts[name].shares), scaling=-1.0)
            if name in parts
            else _nothing(f)
            for name, f in lora.items()
        }
        for name, svd in svd_each(descent, max(f.rank for f in lora.values())).items():
            rank, d_out, d_in = lora[name].rank, lora[name].B.shape[0], lora[name].A.shape[1]
            # padded, so that the bases are whole where the replies have fewer directions than r
            u, s, vh = whole_svd(pad(leading(svd, rank, dtype=torch.float64), rank))
            size = float(s.norm())
            step = self.first_step * (d_out * d_in) ** 0.5 / size if size else 0.0
            lora[name] = LoraFactors(
                A=F.pad(vh, (0, 0, 0, rank - len(vh))).float(),
                B=F.pad(u, (0, rank - u.shape[1])).float(),
                scaling=1.0,
                R=_filled(torch.diag(step * s).float(), rank),
            )
        return replace(state, adapter=replace(state.adapter, lora=lora))


def _nothing(factors: LoraFactors) -> LoraFactors:
    """An update of zero, of these shapes."""
    return LoraFactors(A=torch.zeros_like(factors.A), B=torch.zeros_like(factors.B), scaling=1.0)


def _filled(block: Tensor, rank: int) -> Tensor:
    """The block in the upper left of zeros, [rank, rank]."""
    extra = rank - len(block)
    return F.pad(block, (0, extra, 0, extra))
