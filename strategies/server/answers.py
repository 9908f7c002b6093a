"""What one client's answer is before its content is read: there, refused, diverged, or not there at all."""

from __future__ import annotations

from flwr.app import Error, Message, RecordDict
from flwr.common.constant import ErrorCode

from fedlora.common.errors import WireError
from fedlora.exchange import wire

_LONGEST_REASON = 500  # characters of a client's own words in the record
_AWAY = (ErrorCode.NODE_UNAVAILABLE, ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE)
# What came of a question to one client: None when the deadline passed, a WireError where its node's reply is malformed.
Answer = RecordDict | Error | WireError | None


class AwayError(WireError):
    """A client that gave no answer: its node is gone, or late. An accident, which may be over in the next round."""


class DivergedReplyError(WireError):
    """A client whose training left the finite numbers."""


def of(reply: Message | None) -> RecordDict | Error | None:
    """A message's content, or its error."""
    if reply is None:
        return None
    return reply.error if reply.has_error() else reply.content


def content(answer: Answer, who: str) -> RecordDict:
    """The answer's content, or why there is none."""
    if answer is None:
        raise AwayError(f"{who} did not answer before the deadline (federation.round-timeout)")
    if isinstance(answer, WireError):
        raise answer
    if isinstance(answer, Error):
        reason = (answer.reason or f"error {answer.code}").strip()
        last_line = reason.splitlines()[-1] if reason else "no reason given"
        last_line = "".join(c for c in last_line[:_LONGEST_REASON] if c.isprintable())
        if answer.code == wire.DIVERGED:
            raise DivergedReplyError(f"{who} failed: {last_line}")
        if answer.code == wire.REFUSED:
            raise WireError(f"{who} refused: {last_line}")
        raise (AwayError if answer.code in _AWAY else WireError)(f"{who} failed: {last_line}")
    return answer
