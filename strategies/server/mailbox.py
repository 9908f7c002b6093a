"""Sends questions to nodes over any Flower grid, receives their answers, and repeats questions that Flower lost."""

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

SMALL = 4 << 20  # largest number of bytes of a reply, unless its question says otherwise
# Longest pause between two looks for replies. Flower itself needs up to a minute for a dead node or a full queue.
_LONGEST_PAUSE_SECONDS = 1.0
_MOST_TIMES = 4  # largest number of times that a node is asked the same question
# Flower's errors for a question or a reply whose bytes are lost. For a node that is not there, it has another one.
_LOST = (ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE)
_FOREVER_SECONDS = 10 * 365 * 86400.0
_AGAIN_SECONDS = 5.0  # pause before a node that was not there is asked again
_log = logging.getLogger("fedlora")


@dataclass(eq=False)
class _Question:
    """A question to a node; it has a message id for each time that it was asked.

    Attributes:
        node: Flower's number of the node.
        tag: what the answer is handed out with.
        make: makes the content of the message.
        most: the largest number of bytes that the reply may have.
        others: the largest number of bytes of it that are no values of tensors; 0: a part of `most`.
        ids: the ids of the messages.
        times: number of times that the question was asked.
        away: Flower's answer that the node is not there, if it came.
        next: the time, by `time.monotonic`, at which an absent node is asked again.
    """

    node: int
    tag: int
    make: Callable[[], RecordDict]
    most: Callable[[], int]
    others: int = 0
    ids: list[str] = field(default_factory=list)
    times: int = 0
    away: Message | None = None
    next: float = 0.0


class Mailbox:
    """Questions of one kind to many nodes, with one answer to each.

    When a SuperLink dies, messages on their way are lost without a notice: a question that no node has read, or a reply
    whose upload had begun. When the connection comes back, all open questions are therefore asked again, and the first
    answer counts. Clients give the same answer to a repeated question.

    A node that is not there is asked again when it is back. The mailbox waits for it as long as other nodes still work,
    and then for at most `patience` seconds while `wanted` says that its answer is needed.
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
        meanwhile: Callable[[], None] = lambda: None,
    ) -> None:
        """Make a mailbox.

        Args:
            grid: carries the messages.
            kind: Flower's type of the messages, such as "train".
            group: Flower's group id of the messages.
            timeout: seconds to wait for answers, which is also the lifetime of the messages, since Flower's default
                may be too short for a long round; 0: no limit.
            patience: seconds to wait for absent nodes when no other node works.
            wanted: whether the answers of absent nodes are needed.
            meanwhile: called again and again while answers are waited for; what it raises ends the waiting.
        """
        self._grid, self._kind, self._group = grid, kind, group
        self._ttl = timeout or _FOREVER_SECONDS
        self._deadline = time.monotonic() + timeout if timeout else float("inf")
        self._open: dict[str, _Question] = {}
        self._unasked: deque[_Question] = deque()
        self._unsent: list[int] = []
        self._away: list[_Question] = []
        self._patience, self._wanted, self._alone_since = patience, wanted, math.inf
        self._meanwhile = meanwhile
        self._reconnects = _reconnects(grid)
        self._sizes = sizes.of(grid)
        self._heard = False

    def post(
        self,
        node: int,
        make: Callable[[], RecordDict],
        most: Callable[[], int] = lambda: SMALL,
        others: int = 0,
        tag: int | None = None,
    ) -> None:
        """Ask a node.

        If the grid has a window for this kind of message, at most so many questions are open; others are sent when
        answers have come.

        Args:
            node: Flower's number of the node.
            make: makes the message's content; called each time that the message is sent.
            most: the largest number of bytes of the reply; called after `make`. A larger reply that comes over a
                connection is dropped.
            others: the largest number of bytes of it that are no values of tensors; see `sizes`. If it is larger than
                `most`, the reply may be as large.
            tag: the number with which the answer is handed out, for a node with several questions; else `node`.
        """
        self._unasked.append(_Question(node, node if tag is None else tag, make, most, others))
        self._fill()

    def _fill(self) -> None:
        window_for = getattr(self._grid, "window_for", None)
        window = math.inf if window_for is None else window_for(self._kind)
        while self._unasked and len(self._open) < window:
            self._ask(self._unasked.popleft())

    def replies(self) -> Iterator[tuple[int, Message | None]]:
        """Pairs (tag, reply) as the replies arrive; at the deadline (tag, None) for each question without one."""
        pause = 0.02
        while (self._open or self._waits_for_absent()) and not self._is_over():
            self._meanwhile()
            yield from self.arrived()
            pause = 0.02 if self._heard else min(2 * pause, _LONGEST_PAUSE_SECONDS)
            if (self._open or self._away) and not self._heard:
                time.sleep(min(pause, max(0.0, self._deadline - time.monotonic())))
        yield from ((question.tag, question.away) for question in self._away)
        yield from ((tag, None) for tag in (*self._unsent, *(question.tag for question in self._unasked)))
        yield from ((question.tag, None) for question in {q.tag: q for q in self._open.values()}.values())

    def arrived(self) -> Iterator[tuple[int, Message]]:
        """Pairs (tag, reply) of the replies that came since the last call, without waiting."""
        arrived = list(self._grid.pull_messages(list(self._open))) if self._open else []
        self._heard = bool(arrived)
        for reply in arrived:
            # For a dead node, the SuperLink replies, so that only this id shows which node it is about.
            question = self._open.get(reply.metadata.reply_to_message_id)
            most = self._sizes.arrived(reply.metadata.reply_to_message_id) if self._sizes else None
            if question is None:
                continue
            if most is not None:
                reply.error = Error(wire.REFUSED, f"its reply is larger than {most} bytes, the most that it may have")
            elif reply.has_error() and reply.error.code in _LOST and question.times < _MOST_TIMES:
                del self._open[reply.metadata.reply_to_message_id]
                self._ask_again(question, "its reply was lost on the way")
                continue
            for known in question.ids:
                self._open.pop(known, None)
            if reply.has_error() and reply.error.code == ErrorCode.NODE_UNAVAILABLE and self._patience:
                self._put_aside(question, reply)
                continue
            yield question.tag, reply
        if (count := _reconnects(self._grid)) > self._reconnects:
            self._reconnects = count
            for question in {id(question): question for question in self._open.values()}.values():
                self._ask_again(question, "the connection to the SuperLink was lost")
        self._fill()
        self._ask_absent()

    def take_unsent(self) -> list[int]:
        """The tags of questions that could not be sent, each once."""
        unsent, self._unsent = self._unsent, []
        return unsent

    def give_up(self, tag: int) -> None:
        """Neither send nor repeat the question with this tag; an answer to it is still taken from the grid."""
        self._unasked = deque(question for question in self._unasked if question.tag != tag)
        for question in self._open.values():
            if question.tag == tag:
                question.times = _MOST_TIMES

    @property
    def waited_for(self) -> set[int]:
        """The nodes whose answers have not come yet."""
        return {question.node for question in (*self._open.values(), *self._unasked)}

    def _is_over(self) -> bool:
        return time.monotonic() >= self._deadline

    def _put_aside(self, question: _Question, reply: Message) -> None:
        _log.warning("%s: node %d is not there; it is asked again once it is back", self._kind, question.node)
        question.away, question.next = reply, time.monotonic() + _AGAIN_SECONDS
        self._away.append(question)

    def _waits_for_absent(self) -> bool:
        """Whether to wait for absent nodes although no other node works."""
        if not self._away or not self._wanted():
            return False
        self._alone_since = min(self._alone_since, time.monotonic())
        return time.monotonic() - self._alone_since < self._patience

    def _ask_absent(self) -> None:
        """Ask absent nodes again that are back. Others are not asked, since Flower's error for them takes long."""
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
            if question.times < _MOST_TIMES:
                self._ask_again(question, "the SuperLink lost the message")
                return
            accepted = []
        if accepted and accepted[0]:
            question.ids.append(accepted[0])
            if self._sizes:
                self._sizes.expect(accepted[0], max(question.most(), question.others), question.others)
            self._open[accepted[0]] = question
        elif question.away is not None:
            self._put_aside(question, question.away)
        elif not any(known in self._open for known in question.ids):
            self._unsent.append(question.tag)


class _Counted:
    """A retry invoker's `on_success` that also counts the calls that needed more than one try."""

    def __init__(self, told: Callable[[RetryState], None] | None) -> None:
        self._told = told
        self.reconnects = 0

    def __call__(self, state: RetryState) -> None:
        self.reconnects += state.tries > 1
        if self._told is not None:
            self._told(state)


def _reconnects(grid: Grid) -> int:
    """The number of times that the grid's connection was lost and came back, since the first call for this grid.

    Flower's grid tries again until the SuperLink is back, and only its retry invoker knows of this. A grid without a
    retry invoker has no connection that can be lost.
    """
    invoker = getattr(grid, "_retry_invoker", None)
    if not isinstance(invoker, RetryInvoker):
        return 0
    if not isinstance(invoker.on_success, _Counted):
        invoker.on_success = _Counted(invoker.on_success)
    return invoker.on_success.reconnects
