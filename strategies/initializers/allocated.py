"""An initializer around another one: clients first get the ranks that the run's allocation learned from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor

from fedlora.adapters import AdapterState
from fedlora.exchange import Broadcast, ClientInfo, ClientUpdate, Term

from ..allocations.base import Allocation
from .base import Initializer, Start


@dataclass(frozen=True)
class Allocated(Initializer):
    """One round 0 for both: the allocation learns the ranks, and the inner initializer starts at them.

    Args:
        inner: makes the start; it has no statistic, or that of the allocation.
        allocation: with a statistic.
        settle: gives all clients of the run their ranks by what the allocation learned; LoRA's own start at these.
    """

    inner: Initializer
    allocation: Allocation
    settle: Callable[[dict[str, Tensor]], AdapterState]

    @property
    def statistic(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.allocation.statistic

    @property
    def terms(self) -> tuple[Term, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.terms

    def ask(self, adapter: AdapterState, client: ClientInfo) -> Broadcast:
        """The question of the inner initializer, or else that of the allocation."""
        return (self.inner if self.inner.statistic else self.allocation).ask(adapter, client)

    def start(self, adapter: AdapterState, replies: Iterable[ClientUpdate]) -> Start:
        """The inner initializer's start, at the ranks that the replies lead to."""
        held = list(replies)
        return self.inner.start(self.settle(self.allocation.learn(held)), held if self.inner.statistic else ())
