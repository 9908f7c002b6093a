"""The Strategy base class: pure functions from state and updates to state, and what every strategy shares."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from fedlora.adapters import AdapterState, LoraFactors, first_ranks
from fedlora.adapters.folds import Folds, concatenate
from fedlora.common.errors import StrategyError
from fedlora.exchange import Broadcast, ClientInfo, ClientUpdate, Plan

if TYPE_CHECKING:
    from .initializers.base import Initializer


@dataclass(frozen=True)
class ServerState:
    """What the server holds between rounds.

    Args:
        adapter: the factors that the next round starts from, at the largest rank.
        folds: the frozen updates that every client adds to its base model first.
        memory: what a strategy or a wrapper remembers besides, by a name of its own (momenta, for instance).
        seed: the run's seed, for methods that draw random numbers.
    """

    adapter: AdapterState
    folds: Folds = field(default_factory=Folds)
    memory: Mapping[str, AdapterState] = field(default_factory=dict)
    seed: int = 0

    def updated(self, lora: Mapping[str, LoraFactors], tensors: Mapping[str, Tensor]) -> ServerState:
        """The state with these factors and tensors in its adapter; what is not among them stays as it was.

        Args:
            lora: new factors by module, such as the means of a round.
            tensors: new tensors that are trained in full, by name.
        """
        adapter = AdapterState(lora={**self.adapter.lora, **lora}, tensors={**self.adapter.tensors, **tensors})
        return replace(self, adapter=adapter)


class Strategy(ABC):
    """One aggregation method: a frozen dataclass whose fields are its options, with pure methods.

    Only `aggregate` must be written; what is here serves a method that averages factors.

    Attributes:
        linear: True if the result is a weighted mean of what was uploaded (secure aggregation and
            differential privacy may then wrap it).
        unequal_ranks: True if clients may have different ranks.
        steady: True if row j of A and column j of B keep their meaning from round to round: no restart, no new
            basis. Server optimizers need it, and error feedback of coarse number formats.
        any_kind: True if the method averages whatever adapters consist of, and so serves every `lora.kind`; else it
            needs LoRA's factors A and B.
        personal: the factors, of "A" and "B", that stay on the clients.
        cores: True if the method keeps and aggregates a core R between A and B.
        starts_with: the initializer that the method needs, where LoRA's own start is not enough; see `lora.init`.
        replaces_folds: True if the method takes folds back that it sent a round before. Clients that merge folds into
            the weights cannot do so, and links of a chain of restarts must stay.
    """

    linear: ClassVar[bool] = False
    unequal_ranks: ClassVar[bool] = True
    steady: ClassVar[bool] = False
    any_kind: ClassVar[bool] = False
    personal: ClassVar[frozenset[str]] = frozenset()
    starts_with: ClassVar[str] = ""
    cores: ClassVar[bool] = False
    replaces_folds: ClassVar[bool] = False

    def check(self, clients: Sequence[ClientInfo]) -> None:  # noqa: B027 - most serve everyone
        """Raises StrategyError, before the run starts, if the method cannot serve these clients."""

    def init(self, adapter: AdapterState) -> ServerState:
        """The state before round 1, from a seeded adapter (B = 0) at the largest rank.

        The run adds its seed, and the limits of the folds.
        """
        return ServerState(adapter=adapter)

    def begin(self, state: ServerState, replies: Iterable[ClientUpdate], initializer: Initializer) -> ServerState:
        """The state before round 1, from what clients sent in round 0; without a round 0 there are no replies.

        Args:
            state: of `init`.
            replies: the statistics, to be consumed once.
            initializer: makes the start of them.
        """
        start = initializer.start(state.adapter, replies)
        folds = state.folds
        for fold in start.folds:
            folds = folds.push(fold)
        return replace(state, adapter=start.adapter, folds=folds)

    def broadcast(self, state: ServerState, client: ClientInfo, round: int) -> Broadcast:
        """What this client needs for this round (rounds count from 1): its slice, and the folds that it lacks.

        Raises:
            StrategyError: the client's rank exceeds the largest of the run.
        """
        folds_from, folds = state.folds.since(client.known_base_version)
        return Broadcast(
            round=round,
            adapter=slice_adapter_for(state.adapter, client),
            base_version=state.folds.version,
            folds=folds,
            folds_from=folds_from,
            plan=Plan(keep=self.personal),
            steady=self.steady,
        )

    @abstractmethod
    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate], round: int) -> ServerState:
        """The next state. `updates` is lazy: consume it once, in the order of arrival.

        Raises:
            StrategyError: no reply arrived, or one does not fit.
        """

    def global_adapter(self, state: ServerState) -> AdapterState:
        """Everything learned so far, folds included, as one adapter on the untouched base."""
        return total_update(state)


def slice_for(factors: LoraFactors, client: ClientInfo, module: str) -> LoraFactors:
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


def slice_adapter_for(adapter: AdapterState, client: ClientInfo) -> AdapterState:
    """`slice_for` for every module, and the dense tensors whole."""
    return AdapterState(
        lora={name: slice_for(factors, client, name) for name, factors in adapter.lora.items()}, tensors=adapter.tensors
    )


def whole_adapter(update: ClientUpdate, state: ServerState) -> AdapterState:
    """The factors that a client ended with: one that it did not send is the server's, cut to its rank.

    Args:
        update: a reply of the round that started from `state`.
        state: not of a strategy with personal factors, which the server does not know.
    """
    lora: dict[str, LoraFactors] = {}
    for name, f in update.adapter.lora.items():
        if f.A.numel() and f.B.numel():
            lora[name] = f
            continue
        sent = {"A": f.A, "B": f.B.T, "R": f.R}
        rank = next(len(factor) for factor in sent.values() if factor is not None and factor.numel())
        server = first_ranks(state.adapter.lora[name], rank, f.scaling)
        lora[name] = LoraFactors(
            A=f.A if f.A.numel() else server.A,
            B=f.B if f.B.numel() else server.B,
            scaling=f.scaling,
            R=server.R if f.R is None else f.R,
        )
    return AdapterState(lora=lora, tensors=update.adapter.tensors)


def total_update(state: ServerState) -> AdapterState:
    """All folds plus the current adapter as one adapter of scaling 1, with the dense tensors.

    Current factors with B = 0 add nothing and are left out, save for a module that no fold has.
    """
    folded = {name for part in state.folds.parts for name in part.lora}
    current = {name: f for name, f in state.adapter.lora.items() if name not in folded or bool(f.B.any())}
    lora = concatenate((*state.folds.parts, AdapterState(lora=current))).lora
    return AdapterState(lora=lora, tensors=state.adapter.tensors)
