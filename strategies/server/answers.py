"""The kinds of a client's answer, before its content is read: a reply, a refusal, a diverged training, or none."""

from __future__ import annotations

from flwr.app import Error, Message, RecordDict
from flwr.common.constant import ErrorCode

from fedlora.common.errors import WireError
from fedlora.exchange import wire

_LONGEST_REASON = 500  # largest number of characters of a client's own text in the record
_AWAY = (ErrorCode.NODE_UNAVAILABLE, ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE)
# The result of a question to a client: None if the deadline passed, a WireError if the node's reply is malformed.
Answer = RecordDict | Error | WireError | None


class AwayError(WireError):
    """A client gave no answer, since its node is gone or late. It may be there again in the next round."""


class DivergedReplyError(WireError):
    """The loss or the result of a client's training is not finite."""


def of(reply: Message | None) -> RecordDict | Error | None:
    """A message's content or its error; None without a message."""
    if reply is None:
        return None
    return reply.error if reply.has_error() else reply.content


def content(answer: Answer, who: str) -> RecordDict:
    """The content of a client's answer.

    Args:
        answer: the answer.
        who: the client, for error messages.

    Raises:
        AwayError: the client gave no answer.
        DivergedReplyError: its training diverged.
        WireError: it refused the message or failed, or its reply is malformed.
    """
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
