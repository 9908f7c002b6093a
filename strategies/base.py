"""The Strategy protocol: pure functions from state and updates to state, and the state they share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from fedlora.adapter import AdapterState
from fedlora.exchange import Broadcast, ClientInfo, ClientUpdate

from .folds import Folds


@dataclass(frozen=True)
class ServerState:
    """What the server holds between rounds.

    Args:
        adapter: the factors that the next round starts from, at the largest rank.
        folds: the frozen updates that every client adds to its base model first.
    """

    adapter: AdapterState
    folds: Folds = field(default_factory=Folds)


class Strategy(Protocol):
    """One aggregation method. A frozen dataclass whose fields are its options.

    Attributes:
        linear: True if the result is a weighted mean of what was uploaded (secure aggregation and
            differential privacy may then wrap it).
        unequal_ranks: True if clients may have different ranks.
    """

    linear: ClassVar[bool]
    unequal_ranks: ClassVar[bool]

    def check(self, clients: Sequence[ClientInfo]) -> None:
        """Raises StrategyError, before the run starts, if the method cannot serve these clients."""
        ...

    def init(self, adapter: AdapterState) -> ServerState:
        """The state before round 1, from a seeded adapter (B = 0) at the largest rank."""
        ...

    def broadcast(self, state: ServerState, client: ClientInfo, round: int) -> Broadcast:
        """What this client needs for this round (rounds count from 1)."""
        ...

    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate], round: int) -> ServerState:
        """The next state. `updates` is lazy: consume it once, in the order of arrival."""
        ...

    def global_adapter(self, state: ServerState) -> AdapterState:
        """Everything learned so far, folds included, as one adapter on the untouched base."""
        ...
