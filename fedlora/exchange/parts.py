"""One message for several clients on one node: each client's records under its id, such as "3/head".

A client that answers with an error has one small record, "3/error". Whatever a peer sent, `split` returns a value or
raises a `WireError`. The content of each part is checked by its own decoder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from flwr.app import ConfigRecord, Error, RecordDict

from fedlora.common.errors import WireError

from .fields import short

_NAME = re.compile(r"(0|[1-9][0-9]{0,19})/(.+)", re.ASCII | re.DOTALL)
_ERROR = "error"
_ERROR_KEYS = frozenset({"code", "reason"})
_LARGEST_ID = 2**64 - 1  # Flower's node ids
_LARGEST_CODE = 2**31 - 1


def join(parts: Mapping[int, RecordDict | Error]) -> RecordDict:
    """One record of all parts.

    Args:
        parts: client id -> its message, with at least one record, or its error.

    Raises:
        WireError: a part is empty, or has a record named "error".
    """
    whole = RecordDict()
    for client, part in parts.items():
        if isinstance(part, Error):
            whole[f"{client}/{_ERROR}"] = ConfigRecord({"code": part.code, "reason": part.reason or ""})
            continue
        if not part or _ERROR in part:
            raise WireError(f"client {client}: a part needs records, none of them named {_ERROR!r}")
        for name, record in part.items():
            whole[f"{client}/{name}"] = record
    return whole


def is_joined(record: RecordDict) -> bool:
    """Whether a message has parts. If it also has records outside of parts, `split` refuses it."""
    return any(_NAME.fullmatch(name) for name in record)


def split(record: RecordDict, who: str) -> dict[int, RecordDict | Error]:
    """The inverse of `join`.

    Args:
        record: a message that a peer sent.
        who: the peer, for error messages.

    Raises:
        WireError: there are no records, a name has no client's id, or an error is malformed.
    """
    found: dict[int, RecordDict] = {}
    for name, value in record.items():
        match = _NAME.fullmatch(name)
        if match is None or int(match[1]) > _LARGEST_ID:
            raise WireError(f"{who} sent the record {short(name)}, expected a client's id before it, such as '0/head'")
        found.setdefault(int(match[1]), RecordDict())[match[2]] = value
    if not found:
        raise WireError(f"{who} sent a message without records, expected a part for each client")
    return {client: _error(part, client, who) if _ERROR in part else part for client, part in found.items()}


def _error(part: RecordDict, client: int, who: str) -> Error:
    record = part.config_records.get(_ERROR)
    if record is None or len(part) > 1 or record.keys() != _ERROR_KEYS:
        raise WireError(f"{who} sent a malformed error for client {client}, expected one record of code and reason")
    code, reason = record["code"], record["reason"]
    if type(code) is not int or not 0 <= code <= _LARGEST_CODE or not isinstance(reason, str):
        raise WireError(f"{who} sent a malformed error for client {client}, expected a number and a text")
    return Error(code, reason)
