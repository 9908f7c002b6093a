"""The base class of allocations. An allocation spreads the ranks that a client affords over the modules."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import ClassVar

from torch import Tensor

from fedlora.adapters import AdapterState
from fedlora.common.errors import ConfigError
from fedlora.exchange import Broadcast, ClientInfo, ClientUpdate

from ..tools.questions import question

Shapes = Mapping[str, tuple[int, int]]
Learned = Mapping[str, Tensor]


class Allocation(ABC):
    """A rule for the ranks of all clients of a run: a frozen dataclass whose fields are its options.

    Attributes:
        statistic: name of the statistic that clients measure in a round 0, before round 1 (see
        `Initializer.statistic`).
            If it is empty, the rule needs nothing but the shapes.
    """

    statistic: ClassVar[str] = ""

    def ask(self, adapter: AdapterState, client: ClientInfo) -> Broadcast:
        """The message to one client in round 0; see `Initializer.ask`."""
        return question(self.statistic, adapter, client)

    def learn(self, replies: Iterable[ClientUpdate]) -> dict[str, Tensor]:
        """What the rule keeps of the clients' statistics, as tensors by name; the server saves them with the run.

        Args:
            replies: the statistics in the order of client ids, which can be read only once.
        """
        return {}

    @abstractmethod
    def ranks(self, client: ClientInfo, shapes: Shapes, learned: Learned) -> Mapping[str, int]:
        """The rank of each module on one client.

        Args:
            client: `client.rank_of(module)` is what it affords. Over all modules together, the factors may have as many
                numbers as with these ranks, which is the client's budget.
            shapes: module -> (d_out, d_in), all adapted modules. A rank r takes r (d_out + d_in) numbers.
            learned: what `learn` returned; empty without a statistic.

        Returns:
            Module -> rank, at least 1, for every module. It depends on nothing but the arguments and the options.
        """

    def after_round(self, adapter: AdapterState, learned: Learned) -> AdapterState:
        """The shared adapter after a round, as the rule prunes it; by default, it stays as it is."""
        return adapter

    def modules(self, shapes: Shapes, learned: Learned) -> frozenset[str] | None:
        """The modules that are trained at all; None: all. The others keep the update zero, and are never uploaded."""
        return None


def check_growth(rule: str, growth: float) -> None:
    """Raise ConfigError unless the option `growth` is a number of at least 1."""
    if not 1 <= growth < float("inf"):
        raise ConfigError(f"lora.allocation-options: {rule}'s growth = {growth}, expected a number of at least 1")
