"""FedSVD: like FFA-LoRA, but from time to time the frozen A is replaced by the right singular vectors of B A."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

from torch.nn import functional as F

from fedlora.adapters import AdapterState, LoraFactors, to_fp32
from fedlora.adapters.algebra import whole_svd
from fedlora.common.errors import StrategyError
from fedlora.exchange import Broadcast, ClientInfo, ClientUpdate, Plan

from ..base import ServerState, Strategy
from ..tools.averaging import averaged


@dataclass(frozen=True)
class FedSvd(Strategy):
    """`B = sum_k p_k B_k` with one A for all; with `s B A = U S V'`, the next rounds have `A = V'` and `B = U S / s`.

    Lee et al. 2025, "FedSVD: Adaptive Orthogonalization for Private Federated Learning with LoRA",
    https://arxiv.org/abs/2505.12805. The decomposition does not change the product, so that aggregation is exact. Here
    ranks may differ, as in `ffa`; a client of a smaller rank gets the leading singular directions. While B = 0, A is
    the one drawn with the run's seed. Where S = 0, the rows of A are orthonormal directions of the old A, and the
    columns of B are zero; both can still be trained.
    Memory: one reply. Cost: O(K d_out r), and O(d r^2) more for each decomposition.

    Args:
        period: number of rounds from one decomposition to the next; 1 as in the paper.
    """

    of_mean: ClassVar[bool] = True

    period: int = 1

    def __post_init__(self) -> None:
        if self.period < 1:
            raise StrategyError(f"strategy.options: fedsvd's period = {self.period}, expected at least 1")

    def broadcast(self, state: ServerState, client: ClientInfo, number: int) -> Broadcast:
        """A and B. Clients train and send back only B."""
        return replace(super().broadcast(state, client, number), plan=Plan(frozenset("B"), frozenset("B")))

    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate], number: int) -> ServerState:
        """The mean B with the same A; after every `period` rounds, the same product with a new A."""
        state = averaged(state, updates, number, "B")
        if number % self.period:
            return state
        lora = {name: _turned(factors) if factors.B.any() else factors for name, factors in state.adapter.lora.items()}
        return replace(state, adapter=AdapterState(lora=lora, tensors=state.adapter.tensors))


def _turned(factors: LoraFactors) -> LoraFactors:
    """The same update at the same rank and scaling, but with orthonormal rows of A; rows beyond d_in are zero."""
    u, s, vh = whole_svd(factors)
    b = F.pad(u[:, : len(s)] * (s / factors.scaling), (0, factors.rank - len(s)))
    a = F.pad(vh, (0, 0, 0, factors.rank - len(vh)))
    dtype = to_fp32(factors.A).dtype
    return LoraFactors(A=a.to(dtype), B=b.to(dtype), scaling=factors.scaling)
