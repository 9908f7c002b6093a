"""Personal parts: what an adapter kind says is the client's own stays there, whatever the strategy averages."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from fedlora.exchange import Broadcast, ClientInfo, ClientUpdate

from ..base import ServerState
from .wrapper import Wrapper


@dataclass(frozen=True)
class PersonalParts(Wrapper):
    """Clients keep these parts from round to round, and do not send them; the server's stay as they were drawn.

    A client that has none yet starts from the server's. `lora.kind` asks for this wrapper.

    Args:
        inner: a strategy for every adapter kind, which leaves tensors that no reply contains as they are.
        parts: the ends of the parts' names, such as "mtllora_L".
    """

    parts: frozenset[str] = frozenset()

    @property
    def personal(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.personal | self.parts

    def broadcast(self, state: ServerState, client: ClientInfo, number: int) -> Broadcast:
        """The inner strategy's message, with a plan that leaves the parts on the client."""
        sent = self.inner.broadcast(state, client, number)
        return replace(sent, plan=replace(sent.plan, keep=sent.plan.keep | self.parts))

    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate], number: int) -> ServerState:
        """As the inner strategy."""
        return self.inner.aggregate(state, updates, number)
