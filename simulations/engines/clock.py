"""The local engine on a virtual clock: each client's training takes the time that a device trace gives it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from flwr.app import Message, MessageType

from fedlora.exchange import wire

from .local import SERVER, LocalGrid
from .traces import Traces


class VirtualClock:
    """The time of a run that plays traces.

    Attributes:
        limit: the time up to which it goes on without being asked again.
    """

    def __init__(self) -> None:
        self.limit = math.inf
        self._now = 0.0

    def now(self) -> float:
        """Virtual seconds since the run began."""
        return self._now

    def go(self, to: float) -> None:
        """Set the time."""
        self._now = to

    def pause(self, seconds: float) -> None:
        """Nothing: virtual time passes by answers alone."""


class TimedGrid(LocalGrid):
    """A local grid in which training takes virtual time. Other questions are answered at once.

    Clients train when their first answer is pulled, many as one batch, and their answers wait for their time. All
    answers of one time are handed out together.

    Attributes:
        clock: the virtual clock.
    """

    def __init__(self, *given: Any, traces: Traces) -> None:
        """The arguments are those of `LocalGrid`, and the devices' traces."""
        self.clock, self._traces = VirtualClock(), traces
        self._asked: dict[str, float] = {}
        self._answers: dict[str, tuple[float, Message]] = {}
        super().__init__(*given)

    def window_for(self, kind: str) -> float:
        """All training messages are open, since the first answer may be that of the last."""
        return math.inf if kind == MessageType.TRAIN else super().window_for(kind)

    def awake(self, node: int) -> bool:
        """Whether a node's device is there now."""
        return self._traces.awake(self._client(node), self.clock.now())

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        pushed = list(super().push_messages(messages))
        self._asked |= dict.fromkeys(pushed, self.clock.now())
        return pushed

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        asked = list(message_ids)
        waiting = [self._waiting[known] for known in asked if known in self._waiting]
        if instant := [message for message in waiting if message.metadata.message_type != MessageType.TRAIN]:
            return super().pull_messages([message.metadata.message_id for message in instant])
        while waiting:
            for answer in self._answered(waiting):
                known = answer.metadata.reply_to_message_id
                question = next(message for message in waiting if message.metadata.message_id == known)
                self._answers[known] = (self._time_of(question, answer), answer)
            waiting = [message for message in waiting if message.metadata.message_id in self._waiting]
        times = {known: self._answers[known][0] for known in asked if known in self._answers}
        first = min(times.values(), default=math.inf)
        if first > self.clock.limit:
            self.clock.go(max(self.clock.now(), self.clock.limit))
            return []
        if not times:
            return []
        self.clock.go(max(self.clock.now(), first))
        return [self._answers.pop(known)[1] for known, time in times.items() if time == first]

    def _client(self, node: int) -> int:
        return int(self._node_configs[node - SERVER - 1]["partition-id"])

    def _time_of(self, question: Message, answer: Message) -> float:
        """The time at which an answer arrives."""
        asked = self._asked.pop(question.metadata.message_id)
        down = wire.payload_bytes(question.content)
        if answer.has_error():
            up, tokens = 0, 0
        else:
            up, tokens = wire.payload_bytes(answer.content), wire.tokens_of(answer.content)
        return self._traces.arrives(self._client(question.metadata.dst_node_id), asked, down, tokens, up)
