"""What wrappers share: each stands for another strategy, and changes one step of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedlora.adapters import AdapterState
from fedlora.common.errors import StrategyError
from fedlora.exchange import Broadcast, ClientInfo, ClientUpdate

from ..base import ServerState, Strategy

if TYPE_CHECKING:
    from ..initializers.base import Initializer


@dataclass(frozen=True)
class Wrapper(Strategy):
    """Leaves everything to `inner` but what a subclass overrides.

    The state is the inner strategy's, with entries of the wrapper's own in `memory`; so wrappers nest, in any order
    that their own conditions admit, and one type of state serves all.

    Args:
        inner: the strategy, which may be a wrapper itself, though not of the same class.
    """

    inner: Strategy

    def __post_init__(self) -> None:
        layer = self.inner
        while isinstance(layer, Wrapper):
            if type(layer) is type(self):
                raise StrategyError(f"{type(self).__name__} is around the strategy already; its entries would collide")
            layer = layer.inner

    # Constants of a strategy's class; of a wrapper's instance, since they depend on what is inside.
    @property
    def linear(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.linear

    @property
    def unequal_ranks(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.unequal_ranks

    @property
    def steady(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.steady

    @property
    def any_kind(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.any_kind

    @property
    def personal(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.personal

    @property
    def cores(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.cores

    @property
    def replaces_folds(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.replaces_folds

    @property
    def starts_with(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.starts_with

    def check(self, clients: Sequence[ClientInfo]) -> None:
        """As the inner strategy's."""
        self.inner.check(clients)

    def init(self, adapter: AdapterState) -> ServerState:
        """As the inner strategy's."""
        return self.inner.init(adapter)

    def begin(self, state: ServerState, replies: Iterable[ClientUpdate], initializer: Initializer) -> ServerState:
        """As the inner strategy's."""
        return self.inner.begin(state, replies, initializer)

    def broadcast(self, state: ServerState, client: ClientInfo, round: int) -> Broadcast:
        """As the inner strategy's."""
        return self.inner.broadcast(state, client, round)

    def global_adapter(self, state: ServerState) -> AdapterState:
        """As the inner strategy's."""
        return self.inner.global_adapter(state)


def innermost(strategy: Strategy) -> Strategy:
    """The strategy inside all wrappers."""
    while isinstance(strategy, Wrapper):
        strategy = strategy.inner
    return strategy
