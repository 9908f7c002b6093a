"""The head of every message: the protocol's version, the base model's fingerprint, its tensors' number format."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

from flwr.app import RecordDict

from fedlora.common.errors import WireError

from .codec import FORMATS
from .fields import Fields, short

PROTOCOL = 6
HEAD = "head"
COMMON = frozenset({"protocol", "base", "dtype"})


def head_of(fingerprint: str, dtype: str) -> dict[str, Any]:
    """What every head has."""
    return {"protocol": PROTOCOL, "base": fingerprint, "dtype": dtype}


def checked_head(record: RecordDict, fingerprint: str, who: str) -> Fields:
    """The fields of a message's head.

    Raises:
        WireError: there is no head, or it is of another protocol version, or of another base model.
    """
    head = record.config_records.get(HEAD)
    if head is None:
        raise WireError(f"{who}: the message has no head record; is the other side FedLoRA?")
    if head.get("protocol") != PROTOCOL:
        raise WireError(
            f"{who} uses protocol {short(head.get('protocol'))}, but this side {PROTOCOL}; install the same version of "
            "fedlora on both"
        )
    if head.get("base") != fingerprint:
        raise WireError(
            f"{who} has base model {short(head.get('base'))}, but this side {fingerprint!r}; use the same model.name "
            "and model.revision on both sides"
        )
    if head.get("dtype") not in FORMATS:
        raise WireError(
            f"{who}: unknown number format {short(head.get('dtype'))}; expected one of {', '.join(FORMATS)}"
        )
    return Fields(head, who)


def only(
    record: RecordDict, fields: Fields, keys: Set[str], adapters: tuple[str, ...] = (), others: tuple[str, ...] = ()
) -> None:
    """Raise WireError unless the message has exactly these records, and its head exactly these keys."""
    wanted = keys | {f"{key}.{what}" for key in adapters for what in ("modules", "scalings", "tensors")}
    odd = sorted(({HEAD, *adapters, *others} ^ set(record)) | (wanted ^ set(fields.head)))
    if odd:
        raise WireError(f"{fields.who}: the message lacks, or should not have, {short(odd)}")
