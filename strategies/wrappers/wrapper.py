"""The base class of wrappers. A wrapper is a strategy that contains another strategy and changes one step of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
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
    """Hands every call on to `inner`, except those that a subclass overrides.

    The state is that of the inner strategy. A wrapper adds entries of its own to `memory`. Wrappers can therefore
    contain each other, as far as their own conditions allow.

    Args:
        inner: the strategy inside, which may itself be a wrapper, but not of the same class.
    """

    inner: Strategy

    def __post_init__(self) -> None:
        layer = self.inner
        while isinstance(layer, Wrapper):
            if type(layer) is type(self):
                raise StrategyError(f"{type(self).__name__} wraps the strategy already; use each wrapper once")
            layer = layer.inner

    # These are constants of a strategy's class, but properties of a wrapper, since they depend on the inner strategy.
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
    def own_rows(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.own_rows

    @property
    def one_start(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.one_start

    @property
    def any_statistic(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.any_statistic

    @property
    def starts_with(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.starts_with

    def check(self, clients: Sequence[ClientInfo]) -> None:
        """The check of the inner strategy."""
        self.inner.check(clients)

    def init(self, adapter: AdapterState) -> ServerState:
        """The inner strategy's first state."""
        return self.inner.init(adapter)

    def begin(self, state: ServerState, replies: Iterable[ClientUpdate], initializer: Initializer) -> ServerState:
        """The inner strategy's state before round 1."""
        return self.inner.begin(state, replies, initializer)

    def broadcast(self, state: ServerState, client: ClientInfo, number: int) -> Broadcast:
        """The inner strategy's message."""
        return self.inner.broadcast(state, client, number)

    def global_adapter(self, state: ServerState) -> AdapterState:
        """The inner strategy's global adapter."""
        return self.inner.global_adapter(state)


def layers(strategy: Strategy) -> Iterator[Strategy]:
    """The wrappers from the outside in, and the strategy inside them."""
    while isinstance(strategy, Wrapper):
        yield strategy
        strategy = strategy.inner
    yield strategy


def innermost(strategy: Strategy) -> Strategy:
    """The strategy inside all wrappers."""
    return [*layers(strategy)][-1]
