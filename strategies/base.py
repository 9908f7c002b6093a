"""The Strategy protocol: pure functions from state and updates to state, and what every strategy shares."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from fedlora.adapter import AdapterState, LoraFactors, first_ranks
from fedlora.errors import StrategyError
from fedlora.exchange import Broadcast, ClientInfo, ClientUpdate

from .folds import Folds, concatenate


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

    The round loop sets the field `seed`, where a strategy has one, to the run's seed.

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


def sliced(factors: LoraFactors, client: ClientInfo, module: str) -> LoraFactors:
    """The first rows of A and columns of B, as many as the client's rank, at the client's own scaling.

    Raises:
        StrategyError: the client's rank exceeds the factors'.
    """
    rank = client.rank_of(module)
    if rank > factors.rank:
        raise StrategyError(
            f"{module}: client {client.client_id} has rank {rank}, the server holds rank {factors.rank}; "
            f"lower that client's rank, or start the run with lora.rank = {rank}"
        )
    return first_ranks(factors, rank, client.scaling_of(module))


def sliced_adapter(adapter: AdapterState, client: ClientInfo) -> AdapterState:
    """`sliced` for every module, and the dense tensors whole."""
    return AdapterState(
        lora={name: sliced(factors, client, name) for name, factors in adapter.lora.items()}, dense=adapter.dense
    )


def total(state: ServerState) -> AdapterState:
    """All folds plus the current adapter as one adapter of scaling 1, with the dense tensors.

    Current factors with B = 0 add nothing and are left out, save for a module that no fold has.
    """
    folded = {name for part in state.folds.parts for name in part.lora}
    current = {name: f for name, f in state.adapter.lora.items() if name not in folded or bool(f.B.any())}
    lora = concatenate((*state.folds.parts, AdapterState(lora=current))).lora
    return AdapterState(lora=lora, dense=state.adapter.dense)
