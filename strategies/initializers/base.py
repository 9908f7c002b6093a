"""The base class of initializers. An initializer makes the adapter of round 1, if need be from clients' statistics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fedlora.adapters import AdapterState
from fedlora.exchange import Broadcast, ClientInfo, ClientUpdate, Term

from ..tools.questions import question

if TYPE_CHECKING:
    from fedlora.models import injection


@dataclass(frozen=True)
class Start:
    """The adapter and the folds from which a run starts.

    Args:
        adapter: the shared adapter, at the largest rank.
        folds: frozen updates that every client adds to its base model before round 1. If the adapter's update is not
            zero at the start, a fold with its negative (a scaling below zero) keeps the model what it was.
    """

    adapter: AdapterState
    folds: tuple[AdapterState, ...] = ()


class Initializer(ABC):
    """Makes the adapter of round 1. A subclass is a frozen dataclass whose fields are its options.

    Attributes:
        statistic: name of the statistic that clients measure in a round 0, before round 1: one of `clients/statistics`,
            or a user's own as package.module:Class. If it is empty, there is no round 0.
        cores: True if the start has a core, the small matrix R between B and A. Only strategies with `cores` can use
            such a start.
        unequal_ranks: True if the first rows of the start are a start for clients of a smaller rank.
        terms: what clients keep to while they train, beside what the strategy's plan says (see `Plan.terms`).
    """

    statistic: ClassVar[str] = ""
    cores: ClassVar[bool] = False
    unequal_ranks: ClassVar[bool] = True
    terms: ClassVar[tuple[Term, ...]] = ()

    def check_rank(self, rank: int) -> None:  # noqa: B027 - most serve any rank
        """Check that the start works at this rank of a module.

        Raises:
            StrategyError: it does not.
        """

    def ask(self, adapter: AdapterState, client: ClientInfo) -> Broadcast:
        """The message to one client in round 0. It asks for the statistic of the base model.

        By default, the answer has a pair of factors for each module, at the client's ranks.

        Args:
            adapter: LoRA's own start, of which only the shapes are used.
            client: the client that gets the message.
        """
        return question(self.statistic, adapter, client)

    def check(self, base: injection.Shapes, fingerprint: str) -> None:  # noqa: B027 - most start on any base
        """Check, before the run starts, whether it can start on this base model. A resumed run has started already.

        Args:
            base: shapes of the base model's adapted modules and of its head.
            fingerprint: of the base model.

        Raises:
            FedLoraError: it cannot.
        """

    @abstractmethod
    def start(self, adapter: AdapterState, replies: Iterable[ClientUpdate]) -> Start:
        """The adapter and the folds from which the run starts.

        Args:
            adapter: LoRA's own start at each module's largest rank, with A drawn with the run's seed and B = 0, and a
                classifier's head.
            replies: the clients' statistics in the order of client ids, which can be read only once; empty if the
                initializer has no statistic.
        """
