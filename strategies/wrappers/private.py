"""A wrapper with privacy stages: they change the replies before the strategy, and the adapter after it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fedlora.common.errors import StrategyError
from fedlora.exchange import ClientUpdate
from fedlora.exchange.stages import Stage

from ..base import ServerState
from .wrapper import Wrapper, innermost

if TYPE_CHECKING:
    from ..initializers.base import Initializer


@dataclass(frozen=True)
class Private(Wrapper):
    """Calls the two methods that privacy stages have for the server (see `fedlora.exchange.stages.Stage`).

    Args:
        inner: the strategy inside; it must be linear if a stage needs that.
        stages: the stages, in the order in which they are applied.
    """

    stages: tuple[Stage, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        strict = [type(stage).__name__ for stage in self.stages if stage.linear]
        if strict and not self.inner.linear:
            raise StrategyError(
                f"privacy.stages: {strict[0]} needs a result that is a weighted mean of what is uploaded, and that of "
                f"{type(innermost(self.inner)).__name__} is not; leave out that stage",
                needs="linear",
            )

    def begin(self, state: ServerState, replies: Iterable[ClientUpdate], initializer: Initializer) -> ServerState:
        """What the inner strategy begins with, from the statistics that the stages let through."""
        if initializer.statistic:
            for stage in self.stages:
                replies = stage.arriving(replies, 0)
        return self.inner.begin(state, replies, initializer)

    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate], number: int) -> ServerState:
        """The inner strategy's next state; the stages change its replies and then its adapter."""
        for stage in self.stages:
            updates = stage.arriving(updates, number)
        new = self.inner.aggregate(state, updates, number)
        adapter = new.adapter
        for stage in self.stages:
            adapter = stage.aggregated(state.adapter, adapter, number)
        return replace(new, adapter=adapter)
