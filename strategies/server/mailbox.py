"""Questions to nodes and their answers as they arrive, over any Flower grid; what Flower loses is asked again."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from flwr.app import Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from flwr.supercore.retry import RetryInvoker, RetryState

from fedlora.exchange import wire

from . import sizes

SMALL = 4 << 20  # bytes of a reply without tensors, of any number of clients
# A dead node's error reply, or a full queue, takes Flower up to a minute; asking more often costs more than it gains.
_LONGEST_PAUSE_SECONDS = 1.0
_MOST_TIMES = 4  # that a node is asked one thing
# Flower's own errors for a question, or a reply, whose bytes are gone. A node that is not there has another.
_LOST = (ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE)
_FOREVER_SECONDS = 10 * 365 * 86400.0
_AGAIN_SECONDS = 5.0  # until a node that is not there is asked again
_log = logging.getLogger("fedlora")


@dataclass(eq=False)
class _Question:
    """One thing that a node is asked, under one message id for each time that it is asked.

    Attributes:
        away: the answer that the node is not there, once it came.
        next: when it is asked again, by `time.monotonic`.
    """

    node: int
    make: Callable[[], RecordDict]
    most: Callable[[], int]
    ids: list[str] = field(default_factory=list)
    times: int = 0
    away: Message | None = None
    next: float = 0.0


class Mailbox:
    """Questions of one kind to many nodes, and one answer to each.

    A SuperLink that dies takes with it what was on its way: a question that no node has read, a reply whose upload
    had begun. Nobody is told, so that every question that is open when the connection comes back is asked again; the
    first answer counts. Clients answer a repeated question as they did before.

    A node that is not there is asked again once it is back, as long as others are still at work, and beyond that for
    `patience` seconds while `wanted` says that its answer is needed.
    """

    def __init__(
        self,
        grid: Grid,
        kind: str,
        group: str,
        timeout: float,
        *,
        patience: float = 0.0,
        wanted: Callable[[], bool] = lambda: True,
    ) -> None:
        """A timeout of 0 waits as long as it takes; a message that outlives the timeout is dropped by Flower.

        Without a lifetime of its own, a message has Flower's default one, which a long round may outlast.
        """
        self._grid, self._kind, self._group = grid, kind, group
        self._ttl = timeout or _FOREVER_SECONDS
        self._deadline = time.monotonic() + timeout if timeout else float("inf")
        self._open: dict[str, _Question] = {}
        self._unasked: deque[_Question] = deque()
        self._unsent: list[int] = []
        self._away: list[_Question] = []
        self._patience, self._wanted, self._alone_since = patience, wanted, math.inf
        self._reconnects = _reconnects(grid)
        self._sizes = sizes.of(grid)
        self._heard = False

    def post(self, node: int, make: Callable[[], RecordDict], most: Callable[[], int] = lambda: SMALL) -> None:
        """Ask a node; `make` gives the message's content, each time that it is sent.

        Where a reply comes over a connection, one of more bytes than `most` says, once the message is made, is dropped.

        A grid with a `window` has at most so many questions open; the others are sent as answers come.
        """
        self._unasked.append(_Question(node, make, most))
        self._fill()

    def _fill(self) -> None:
        window = getattr(self._grid, "window", math.inf)
        while self._unasked and len(self._open) < window:
            self._ask(self._unasked.popleft())

    def replies(self) -> Iterator[tuple[int, Message | None]]:
        """`(node, reply)` as they arrive; at the deadline `(node, None)` for each that did not answer."""
        pause = 0.02
        while (self._open or self._waits_for_absent()) and not self._is_over():
            yield from self.arrived()
            pause = 0.02 if self._heard else min(2 * pause, _LONGEST_PAUSE_SECONDS)
            if (self._open or self._away) and not self._heard:
                time.sleep(min(pause, max(0.0, self._deadline - time.monotonic())))
        yield from ((question.node, question.away) for question in self._away)
        yield from ((node, None) for node in (*self._unsent, *(question.node for question in self._unasked)))
        yield from ((question.node, None) for question in {q.node: q for q in self._open.values()}.values())

    def arrived(self) -> Iterator[tuple[int, Message]]:
        """What came since the last look; nothing is waited for."""
        arrived = list(self._grid.pull_messages(list(self._open))) if self._open else []
        self._heard = bool(arrived)
        for reply in arrived:
            # The reply for a dead node comes from the SuperLink, so that only this id says who is meant.
            question = self._open.get(reply.metadata.reply_to_message_id)
            if question is None:
                continue
            if self._sizes and reply.metadata.reply_to_message_id in self._sizes.too_large:
                most = self._sizes.too_large[reply.metadata.reply_to_message_id]
                reply.error = Error(wire.REFUSED, f"its reply is larger than the {most} bytes that it may hold")
            elif reply.has_error() and reply.error.code in _LOST and question.times < _MOST_TIMES:
                del self._open[reply.metadata.reply_to_message_id]
                self._ask_again(question, "its reply was lost on the way")
                continue
            for known in question.ids:
                self._open.pop(known, None)
            if reply.has_error() and reply.error.code == ErrorCode.NODE_UNAVAILABLE and self._patience:
                self._put_aside(question, reply)
                continue
            yield question.node, reply
        if (count := _reconnects(self._grid)) > self._reconnects:
            self._reconnects = count
            for question in {id(question): question for question in self._open.values()}.values():
                self._ask_again(question, "the connection to the SuperLink was lost")
        self._fill()
        self._ask_absent()

    @property
    def waited_for(self) -> set[int]:
        """The nodes whose answer has not come."""
        return {question.node for question in (*self._open.values(), *self._unasked)}

    def _is_over(self) -> bool:
        return time.monotonic() >= self._deadline

    def _put_aside(self, question: _Question, reply: Message) -> None:
        _log.warning("%s: node %d is not there; it is asked again once it is back", self._kind, question.node)
        question.away, question.next = reply, time.monotonic() + _AGAIN_SECONDS
        self._away.append(question)

    def _waits_for_absent(self) -> bool:
        """Whether to wait for nodes that are not there, when nobody else is at work."""
        if not self._away or not self._wanted():
            return False
        self._alone_since = min(self._alone_since, time.monotonic())
        return time.monotonic() - self._alone_since < self._patience

    def _ask_absent(self) -> None:
        """Ask those again that are back: a question to a node that is not listed would wait for Flower's error."""
        due = [question for question in self._away if time.monotonic() >= question.next]
        if not due:
            return
        there = {*self._grid.get_node_ids()}
        for question in due:
            question.next = time.monotonic() + _AGAIN_SECONDS
            if question.node in there:
                self._away.remove(question)
                self._alone_since = math.inf
                self._ask(question)

    def _ask_again(self, question: _Question, why: str) -> None:
        if question.times < _MOST_TIMES:
            _log.warning("%s: node %d is asked again: %s", self._kind, question.node, why)
            self._ask(question)

    def _ask(self, question: _Question) -> None:
        question.times += 1
        message = Message(question.make(), question.node, self._kind, ttl=self._ttl, group_id=self._group)
        try:
            accepted = list(self._grid.push_messages([message]))
        except ObjectPushError:  # the SuperLink died while it took the message
            self._ask_again(question, "the SuperLink lost the message")
            return
        if accepted and accepted[0]:
            question.ids.append(accepted[0])
            if self._sizes:
                self._sizes.expect(accepted[0], question.most())
            self._open[accepted[0]] = question
        elif question.away is not None:
            self._put_aside(question, question.away)
        elif not any(known in self._open for known in question.ids):
            self._unsent.append(question.node)


class _Counted:
    """A retry invoker's `on_success`, which also counts the calls that needed more than one try."""

    def __init__(self, told: Callable[[RetryState], None] | None) -> None:
        self._told = told
        self.reconnects = 0

    def __call__(self, state: RetryState) -> None:
        self.reconnects += state.tries > 1
        if self._told is not None:
            self._told(state)


def _reconnects(grid: Grid) -> int:
    """How often the grid's connection was lost and came back, counted from the first call for this grid.

    Flower's grid tries again until the SuperLink is back, and tells nobody but its own retry invoker. A grid without
    one has no connection to lose.
    """
    invoker = getattr(grid, "_retry_invoker", None)
    if not isinstance(invoker, RetryInvoker):
        return 0
    if not isinstance(invoker.on_success, _Counted):
        invoker.on_success = _Counted(invoker.on_success)
    return invoker.on_success.reconnects
