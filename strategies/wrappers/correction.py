"""What FedDyn and SCAFFOLD have in common: the one trained factor whose gradients can be added up over rounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedlora.adapters import AdapterState
from fedlora.common.errors import StrategyError
from fedlora.exchange import ClientInfo

from ..base import trained_in_turn
from .wrapper import Wrapper, innermost


@dataclass(frozen=True)
class Correction(Wrapper):
    """A correction of many local steps over a strategy in which all but one factor is fixed.

    In a product of two trained factors, the sums of gradients of different rounds would mean nothing.

    Attributes:
        correction: its name in the config, for messages.

    Args:
        inner: a steady strategy that trains the same one factor of A, B and R in every round: ffa or fedsb.
    """

    correction: ClassVar[str]

    @property
    def linear(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return False

    @property
    def any_kind(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return False

    def check(self, clients: Sequence[ClientInfo]) -> None:
        """Check that one factor is trained, in all rounds, at one rank.

        Raises:
            StrategyError: the inner strategy refuses the clients, or trains another factor or several, or ranks differ.
        """
        super().check(clients)
        name = type(innermost(self.inner)).__name__
        first, *others = trained_in_turn(self.inner)
        if len(first) != 1 or any(each != first for each in others) or self.inner.personal or not self.inner.steady:
            raise StrategyError(
                f"strategy.correction = {self.correction} adds up gradients of one factor over rounds, while all else "
                f"is fixed; {name} trains several factors, or other ones, or changes their basis; use strategy.name = "
                "ffa or fedsb"
            )
        if len({client.all_ranks for client in clients}) > 1:
            raise StrategyError(
                f"strategy.correction = {self.correction} needs one rank for all clients; set lora.ranks = '' and "
                f"lora.rank = {max(client.rank for client in clients)}"
            )


def alone(adapter: AdapterState) -> AdapterState:
    """The adapter without tensors that are trained in full, which no correction changes."""
    return AdapterState(lora=adapter.lora)
