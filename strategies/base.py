"""The base class of strategies, the server's state, and functions that every strategy shares.

A strategy is a set of pure functions: from the state and the clients' updates, they compute the next state.
"""

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
        adapter: the adapter from which the next round starts, with factors of the largest rank.
        folds: the frozen updates that every client adds to its base model before it trains.
        memory: further tensors that a strategy or a wrapper keeps between rounds, such as momenta, each under a name
            that only this strategy or wrapper uses.
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

    A subclass must write only `aggregate`. The other methods fit any method that averages factors.

    Attributes:
        linear: True if the result is a weighted mean of the clients' uploads. Secure aggregation and differential
            privacy need this.
        of_mean: True if the result depends on the uploads by their weighted mean alone, in which an upload of a smaller
            rank has zeros in the rows that it lacks. A secure sum then serves at any ranks.
        unequal_ranks: True if clients may have different ranks.
        steady: True if row j of A and column j of B mean the same from one round to the next, so that nothing restarts
            or changes its basis. Server optimizers need this, and so does the error feedback of coarse number formats.
        any_kind: True if the method averages the tensors of an adapter whatever they are, and so works with every
            `lora.kind`. False if it needs LoRA's factors A and B.
        personal: the factors ("A", "B") that stay on the clients.
        cores: True if the method aggregates a core, the small matrix R between B and A.
        starts_with: name of the initializer that the method needs (see `lora.init`); empty if LoRA's own start will do.
        replaces_folds: True if the method takes back folds that it sent a round before. Clients that merge folds into
            the weights cannot do that, and the folds of restarts cannot be taken back.
        own_rows: True if a client of a smaller rank trains rows of the server's factors, or groups of a kind's parts,
            that are chosen for it, so that the adapters of such clients cannot be compared with each other.
        one_start: False if clients of equal ranks may start from different factors, so that their ends cannot be
            compared with each other.
        anew: True if each round begins with an update of zero beside the folds, so that what a client made is its
            product `B A` alone.
        any_statistic: False if the replies of a round 0, before round 1, cannot be used, whatever clients measure.
    """

    linear: ClassVar[bool] = False
    of_mean: ClassVar[bool] = False
    of_ideal: ClassVar[bool] = False
    needs_means: ClassVar[bool] = False
    unequal_ranks: ClassVar[bool] = True
    steady: ClassVar[bool] = False
    any_kind: ClassVar[bool] = False
    personal: ClassVar[frozenset[str]] = frozenset()
    starts_with: ClassVar[str] = ""
    cores: ClassVar[bool] = False
    replaces_folds: ClassVar[bool] = False
    own_rows: ClassVar[bool] = False
    one_start: ClassVar[bool] = True
    anew: ClassVar[bool] = False
    any_statistic: ClassVar[bool] = True

    def check(self, clients: Sequence[ClientInfo]) -> None:  # noqa: B027 - most serve everyone
        """Check, before the run starts, whether the method can serve these clients.

        Raises:
            StrategyError: it cannot.
        """

    def init(self, adapter: AdapterState) -> ServerState:
        """The state before round 1.

        The run adds its seed and the limits of the folds.

        Args:
            adapter: the run's first adapter, at the largest rank: A drawn with the run's seed, B = 0.
        """
        return ServerState(adapter=adapter)

    def begin(self, state: ServerState, replies: Iterable[ClientUpdate], initializer: Initializer) -> ServerState:
        """The state before round 1, computed from the statistics that clients sent in round 0.

        Args:
            state: the state that `init` returned.
            replies: the clients' statistics, which can be read only once; empty if the run has no round 0.
            initializer: computes the start from the statistics.
        """
        start = initializer.start(state.adapter, replies)
        folds = state.folds
        for fold in start.folds:
            folds = folds.push(fold)
        return replace(state, adapter=start.adapter, folds=folds)

    def broadcast(self, state: ServerState, client: ClientInfo, number: int) -> Broadcast:
        """The message to one client at the start of a round: its slice of the adapter, and the folds that it lacks.

        Args:
            state: the state before the round.
            client: the client that gets the message.
            number: number of the round, from 1.

        Raises:
            StrategyError: the client's rank is larger than the server's.
        """
        folds_from, folds = state.folds.since(client.known_base_version)
        return Broadcast(
            round=number,
            adapter=slice_adapter_for(state.adapter, client),
            base_version=state.folds.version,
            folds=folds,
            folds_from=folds_from,
            plan=Plan(keep=self.personal),
            steady=self.steady,
        )

    @abstractmethod
    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate], number: int) -> ServerState:
        """The state after a round.

        Args:
            state: the state from which the round started.
            updates: the clients' replies in the order of their arrival. They are received while they are read, and
                can be read only once.
            number: number of the round, from 1.

        Raises:
            StrategyError: no reply arrived, or a reply does not fit the state.
        """

    def global_adapter(self, state: ServerState) -> AdapterState:
        """The sum of all folds and the current adapter, as one adapter for the unchanged base model."""
        return total_update(state)


def trained_in_turn(strategy: Strategy) -> list[frozenset[str]]:
    """The factors that clients train in rounds 1 to 4; methods that take turns have short periods."""
    empty, nobody = strategy.init(AdapterState()), ClientInfo(client_id=0, rank=1)
    return [strategy.broadcast(empty, nobody, number).plan.train for number in range(1, 5)]


def slice_for(factors: LoraFactors, client: ClientInfo, module: str) -> LoraFactors:
    """The first r rows of A and columns of B, where r is the client's rank, converted to the client's own scaling.

    Args:
        factors: the server's factors of the module.
        client: gives the rank r and the scaling.
        module: name of the module.

    Raises:
        StrategyError: the client's rank is larger than that of the factors.
    """
    rank = client.rank_of(module)
    if rank > factors.rank:
        raise StrategyError(
            f"{module}: client {client.client_id} has rank {rank}, the server holds rank {factors.rank}; "
            f"lower that client's rank, or start the run with lora.rank = {rank}"
        )
    return first_ranks(factors, rank, client.scaling_of(module))


def slice_adapter_for(adapter: AdapterState, client: ClientInfo) -> AdapterState:
    """The adapter with `slice_for` applied to every module; tensors that are trained in full are not cut."""
    return AdapterState(
        lora={name: slice_for(factors, client, name) for name, factors in adapter.lora.items()}, tensors=adapter.tensors
    )


def whole_adapter(update: ClientUpdate, state: ServerState) -> AdapterState:
    """A client's whole adapter after training: factors that it did not send are those that it was sent.

    Args:
        update: a client's reply. If it does not say what the client was sent, that is the server's, cut to its rank.
        state: the state from which the round started. Its strategy must not have personal factors, since the server
            does not know these.
    """
    lora: dict[str, LoraFactors] = {}
    for name, f in update.adapter.lora.items():
        if f.A.numel() and f.B.numel():
            lora[name] = f
            continue
        sent = {"A": f.A, "B": f.B.T, "R": f.R}
        rank = next(len(factor) for factor in sent.values() if factor is not None and factor.numel())
        begun = update.start
        server = begun.lora[name] if begun else first_ranks(state.adapter.lora[name], rank, f.scaling)
        lora[name] = LoraFactors(
            A=f.A if f.A.numel() else server.A,
            B=f.B if f.B.numel() else server.B,
            scaling=f.scaling,
            R=server.R if f.R is None else f.R,
        )
    return AdapterState(lora=lora, tensors=update.adapter.tensors)


def total_update(state: ServerState) -> AdapterState:
    """The sum of all folds and the current adapter, as one adapter of scaling 1, with the tensors trained in full.

    Current factors with B = 0 add nothing. They are left out, except in modules without a fold.
    """
    folded = {name for part in state.folds.parts for name in part.lora}
    current = {name: f for name, f in state.adapter.lora.items() if name not in folded or bool(f.B.any())}
    lora = concatenate((*state.folds.parts, AdapterState(lora=current))).lora
    return AdapterState(lora=lora, tensors=state.adapter.tensors)
