"""Privacy stages around a strategy: on the replies that it sees, and on the adapter that it makes."""

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
    """The server's two places of `fedlora.exchange.stages.Stage`.

    Args:
        inner: any strategy; a linear one, where a stage needs that.
        stages: in their order.
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

    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate], round: int) -> ServerState:
        """The inner strategy's next state, between the stages."""
        for stage in self.stages:
            updates = stage.arriving(updates, round)
        new = self.inner.aggregate(state, updates, round)
        adapter = new.adapter
        for stage in self.stages:
            adapter = stage.aggregated(state.adapter, adapter, round)
        return replace(new, adapter=adapter)
