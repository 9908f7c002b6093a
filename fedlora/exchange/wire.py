"""Converts messages to Flower records and back. Every name, shape, number format and value is checked.

Every message names the protocol version and the base model's fingerprint.

A client's reply can contain only what its broadcast implies: names and shapes are compared before any value is used.
No memory is allocated by a size that a peer declares. The names of metrics are a fixed list. Whatever a peer sent, a
decoder returns a value or raises a `WireError`.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ParamSpec, TypeVar, cast

from flwr.app import ConfigRecord, RecordDict
from torch.profiler import record_function

from fedlora.adapters import AdapterState, keep_factors, map_tensors
from fedlora.adapters.flat import OWN
from fedlora.common.errors import ConfigError, WireError
from fedlora.config import MOST_RANK, alpha_of

from .arrays import finite_sum, get, put, value_bytes
from .codec import FORMATS, SPARSE, round_trip
from .fields import METRICS_RECORD, Fields, metrics_record, read_metrics, require, short
from .messages import Broadcast, ClientInfo, ClientUpdate, Plan, Term

PROTOCOL = 4
# Codes of a client's error: it refuses the message; it no longer has the folds; its loss is not finite.
REFUSED, STALE, DIVERGED = 1001, 1002, 1003
TRAIN_METRICS = frozenset(
    {
        "train-loss",
        "train-last-loss",
        "train-steps",
        "train-tokens",
        "train-seconds",
        "codec-error",
        "client-seconds",
        "peak-memory-bytes",
        "train-cut",
        "train-rate",
    }
)
# The largest number of examples that a client may claim, since this number is its weight in every mean.
MOST_EXAMPLES = 10**9
_ROOM, _NAME = 1 << 20, 1024  # allowed bytes of a reply besides its tensors, and of a tensor besides its values
_HEAD, _ADAPTER, _CONTROL = "head", "adapter", "control"
_COMMON = ("protocol", "base", "dtype")
_TERMS = ("terms", "term-weights", "term-values")
_KEYS = MappingProxyType(
    {
        "broadcast": frozenset(
            {
                *_COMMON,
                *("round", "base-version", "folds-from", "folds"),
                *("train", "send", "keep", "frozen", "modules", "all-modules", *_TERMS, "begun", "span", "steady"),
                *("job", "run", "probe", "control", "counted"),
            }
        ),
        "update": frozenset(
            {*_COMMON, "client-id", "num-examples", "base-version", "known-base-version", "round", "job"}
        ),
        "hello": frozenset(_COMMON),
        "info": frozenset(
            {
                *_COMMON,
                *("client-id", "rank", "alpha", "num-examples"),
                *("rslora", "rank-pattern", "rank-pattern-ranks", "class-names"),
            }
        ),
        "evaluation": frozenset({*_COMMON, "num-examples"}),
    }
)
_Given = ParamSpec("_Given")
_Made = TypeVar("_Made")


def _timed(function: Callable[_Given, _Made]) -> Callable[_Given, _Made]:
    """The function, with its time counted as "codec" in a profile."""

    @functools.wraps(function)
    def within(*args: _Given.args, **kwargs: _Given.kwargs) -> _Made:
        with record_function("fedlora/codec"):
            return function(*args, **kwargs)

    return within


@dataclass(frozen=True)
class Reply:
    """A client's update, and the base version whose folds the client will still have in the next round (0: none)."""

    update: ClientUpdate
    known_base_version: int


@_timed
def encode_broadcast(broadcast: Broadcast, fingerprint: str, dtype: str = "fp32") -> RecordDict:
    """A train or evaluate message for one client.

    Args:
        broadcast: the message.
        fingerprint: the base model's fingerprint.
        dtype: number format of the adapter's tensors, unless the broadcast is sparse.

    Raises:
        WireError: a value is not finite in this number format.
    """
    head = _head(fingerprint, SPARSE if broadcast.sparse else dtype) | {
        "round": broadcast.round,
        "base-version": broadcast.base_version,
        "folds-from": broadcast.folds_from,
        "folds": len(broadcast.folds),
        "train": "".join(sorted(broadcast.plan.train)),
        "send": "".join(sorted(broadcast.plan.send)),
        "keep": sorted(broadcast.plan.keep),
        "frozen": sorted(broadcast.plan.frozen),
        "modules": sorted(broadcast.plan.modules or ()),
        "all-modules": broadcast.plan.modules is None,
        "terms": [term.name for term in broadcast.plan.terms],
        "term-weights": [float(term.weight) for term in broadcast.plan.terms],
        "term-values": [float(term.value) for term in broadcast.plan.terms],
        "begun": broadcast.plan.begun,
        "span": broadcast.plan.span,
        "steady": broadcast.steady,
        "job": broadcast.job,
        "run": broadcast.run,
        "probe": [float(number) for number in broadcast.probe],
        "control": broadcast.control is not None,
        "counted": broadcast.counted,
    }
    record = RecordDict()
    put(record, head, _ADAPTER, broadcast.adapter)
    for index, fold in enumerate(broadcast.folds):
        put(record, head, f"fold-{index}", fold)
    if broadcast.control is not None:
        put(record, head, _CONTROL, broadcast.control)
    record[_HEAD] = ConfigRecord(head)
    return record


@_timed
def decode_broadcast(record: RecordDict, fingerprint: str) -> Broadcast:
    """The broadcast in a message, as a client reads it.

    Raises:
        WireError: the message is malformed, of another protocol version, or made for another base model.
    """
    who = "the server"
    fields = _checked_head(record, fingerprint, who)
    count = fields.integer("folds", most=len(record))
    keys = (_ADAPTER, *(f"fold-{i}" for i in range(count)))
    controlled = fields.flag("control")
    _only(record, fields, "broadcast", (*keys, _CONTROL) if controlled else keys)
    adapter, train = get(record, fields, _ADAPTER, "ABR"), fields.letters("train", "ABR")
    trained = AdapterState(lora=keep_factors(adapter, train).lora)
    return Broadcast(
        round=fields.integer("round"),
        adapter=adapter,
        base_version=fields.integer("base-version"),
        folds=tuple(get(record, fields, key, "ABR") for key in keys[1:]),
        folds_from=fields.integer("folds-from"),
        plan=Plan(
            train=train,
            send=fields.letters("send", "ABR"),
            keep=frozenset(fields.items("keep", str)),
            frozen=frozenset(fields.items("frozen", str)),
            modules=None if fields.flag("all-modules") else frozenset(fields.items("modules", str)),
            terms=_terms(fields),
            begun=fields.positive("begun", max(1, fields.integer("round"))),
            span=fields.integer("span"),
        ),
        steady=fields.flag("steady"),
        job=fields.name("job"),
        run=fields.run_key(),
        probe=tuple(fields.numbers("probe")),
        control=get(record, fields, _CONTROL, train, like=trained) if controlled else None,
        counted=fields.integer("counted"),
    )


def _terms(fields: Fields) -> tuple[Term, ...]:
    names, numbers = fields.items(_TERMS[0], str), [fields.numbers(key) for key in _TERMS[1:]]
    if any(len(each) != len(names) for each in numbers):
        raise WireError(f"{fields.who}: malformed terms of the loss {short(names)}: {short(numbers)}")
    return tuple(itertools.starmap(Term, zip(names, *numbers, strict=True)))


@_timed
def encode_update(
    update: ClientUpdate,
    fingerprint: str,
    dtype: str = "fp32",
    send: frozenset[str] = frozenset({"A", "B"}),
    known_base_version: int = 0,
    *,
    number: int = 1,
    job: str = "train",
) -> RecordDict:
    """A client's answer to a train message.

    Args:
        update: the client's update. With fp32, its adapter is the trained one; with other formats, it is the difference
            to the broadcast's adapter (see `codec`).
        fingerprint: the base model's fingerprint.
        dtype: number format of the tensors, one of `codec.FORMATS`.
        send: the factors that are sent, from the broadcast's plan.
        known_base_version: the base version whose folds this client will still have in the next round (0: none).
        number: number of the broadcast's round.
        job: the broadcast's job.

    Raises:
        WireError: a value is not finite in this number format, or a metric is none of `TRAIN_METRICS`.
    """
    head = _head(fingerprint, dtype) | {
        "client-id": update.client_id,
        "num-examples": update.num_examples,
        "base-version": update.base_version,
        "known-base-version": known_base_version,
        "round": number,
        "job": job,
    }
    record = RecordDict()
    put(record, head, _ADAPTER, keep_factors(update.adapter, send))
    record[_HEAD] = ConfigRecord(head)
    record[METRICS_RECORD] = metrics_record(update.metrics, TRAIN_METRICS)
    return record


@_timed
def decode_update(
    record: RecordDict, client_id: int, sent: Broadcast, fingerprint: str, most_examples: int = MOST_EXAMPLES
) -> Reply:
    """The update in a client's answer, after a comparison with the broadcast to this client.

    Args:
        record: the answer.
        client_id: the client that should have sent it.
        sent: the broadcast as this client received it; see `as_received`.
        fingerprint: the base model's fingerprint.
        most_examples: the largest number of examples that the client may claim.

    Raises:
        WireError: the answer is malformed, or is from another client or for another round, job or base version; a
            module, shape or scaling differs from the broadcast; a value is not finite; the number of examples is not
            positive or too large; or a metric is unknown or missing.
    """
    who = f"client {client_id}"
    fields = _checked_head(record, fingerprint, who)
    _only(record, fields, "update", (_ADAPTER,), METRICS_RECORD)
    fields.expect("client id", fields.integer("client-id"), client_id)
    fields.expect("job", fields.text("job"), sent.job)
    fields.expect("round", fields.integer("round"), sent.round)
    fields.expect("base version", fields.integer("base-version"), sent.base_version)
    known = fields.integer("known-base-version")
    if known not in (0, sent.base_version):
        raise WireError(f"{who} sent known-base-version {known}, expected 0 or {sent.base_version}")
    examples = fields.positive("num-examples", most_examples)
    metrics = read_metrics(record, who, TRAIN_METRICS)
    adapter = get(record, fields, _ADAPTER, sent.plan.send, like=sent.plan.sent_back(sent.adapter))
    if fields.head["dtype"] != "fp32":
        adapter = map_tensors(finite_sum(fields.who), adapter, sent.adapter)
    require(metrics, TRAIN_METRICS, who)
    update = ClientUpdate(
        client_id=client_id,
        adapter=adapter,
        num_examples=examples,
        base_version=sent.base_version,
        metrics=metrics,
        start=sent.adapter,
    )
    return Reply(update, known_base_version=known)


def most_bytes(sent: Broadcast) -> int:
    """An upper bound for the bytes of an answer to this broadcast."""
    return _ROOM + value_bytes(sent.adapter) + _NAME * len(OWN.put(sent.adapter))


@_timed
def as_received(broadcast: Broadcast, dtype: str) -> Broadcast:
    """The broadcast as its client receives it, with the adapter rounded to the message's number format."""
    if dtype == "fp32" or broadcast.sparse:
        return broadcast
    return replace(broadcast, adapter=round_trip(broadcast.adapter, dtype))


def encode_hello(fingerprint: str) -> RecordDict:
    """The server's first question to a client, naming its base model."""
    return RecordDict({_HEAD: ConfigRecord(_head(fingerprint, "fp32"))})


def check_hello(record: RecordDict, fingerprint: str) -> None:
    """Raise WireError if the server has another protocol version or another base model."""
    _only(record, _checked_head(record, fingerprint, "the server"), "hello")


def encode_info(info: ClientInfo, fingerprint: str) -> RecordDict:
    """A client's answer to the server's first question: its description."""
    head = _head(fingerprint, "fp32") | {
        "client-id": info.client_id,
        "rank": info.rank,
        "alpha": str(info.alpha),
        "num-examples": info.num_examples,
        "rslora": info.rslora,
        "rank-pattern": list(info.rank_pattern),
        "rank-pattern-ranks": list(info.rank_pattern.values()),
        "class-names": list(info.class_names),
    }
    return RecordDict({_HEAD: ConfigRecord(cast("Any", head))})


def decode_info(record: RecordDict, fingerprint: str, who: str) -> ClientInfo:
    """The description in a client's answer.

    Raises:
        WireError: the answer is malformed, or its rank, alpha or number of examples is out of bounds.
    """
    fields = _checked_head(record, fingerprint, who)
    _only(record, fields, "info")
    patterns, ranks = fields.items("rank-pattern", str), fields.items("rank-pattern-ranks", int)
    if len(patterns) != len(ranks) or not all(1 <= rank <= MOST_RANK for rank in ranks):
        raise WireError(f"{who}: malformed rank pattern {short(patterns)}: {short(ranks)}")
    rank, alpha = fields.positive("rank", MOST_RANK), fields.text("alpha")
    try:
        scale = alpha_of(alpha, rank)
    except ConfigError:
        scale = math.nan
    if not 0 < scale < math.inf:
        raise WireError(f"{who} sent alpha {short(alpha)}, expected a number above 0 or such as '2r'")
    return ClientInfo(
        client_id=fields.integer("client-id"),
        rank=rank,
        alpha=alpha,
        num_examples=fields.positive("num-examples", MOST_EXAMPLES),
        rslora=fields.flag("rslora"),
        rank_pattern=dict(zip(patterns, ranks, strict=True)),
        class_names=fields.class_names(),
    )


def encode_evaluation(
    num_examples: int, metrics: Mapping[str, float], fingerprint: str, names: frozenset[str]
) -> RecordDict:
    """A client's answer to an evaluate message: a number for each of the task's metrics.

    Args:
        num_examples: number of examples on which the client evaluated.
        metrics: metrics by name.
        fingerprint: the base model's fingerprint.
        names: the names that may be sent.
    """
    head = _head(fingerprint, "fp32") | {"num-examples": num_examples}
    return RecordDict({_HEAD: ConfigRecord(cast("Any", head)), METRICS_RECORD: metrics_record(metrics, names)})


def decode_evaluation(
    record: RecordDict, fingerprint: str, who: str, names: frozenset[str], most_examples: int = MOST_EXAMPLES
) -> tuple[int, dict[str, float]]:
    """The number of examples and the metrics in a client's answer to an evaluate message.

    Args:
        record: the answer.
        fingerprint: the base model's fingerprint.
        who: the client, for error messages.
        names: the names of the task's metrics.
        most_examples: the largest number of examples that the client may claim.

    Raises:
        WireError: the answer is malformed, or a value is out of bounds.
    """
    fields = _checked_head(record, fingerprint, who)
    _only(record, fields, "evaluation", (), METRICS_RECORD)
    metrics = read_metrics(record, who, names)
    require(metrics, names & {"loss", "accuracy"}, who)
    return fields.positive("num-examples", most_examples), metrics


def payload_bytes(record: RecordDict) -> int:
    """The number of bytes of all tensors in a message, with their headers."""
    return sum(len(array.data) for arrays in record.array_records.values() for array in arrays.values())


def _head(fingerprint: str, dtype: str) -> dict[str, Any]:
    return {"protocol": PROTOCOL, "base": fingerprint, "dtype": dtype}


def _checked_head(record: RecordDict, fingerprint: str, who: str) -> Fields:
    head = record.config_records.get(_HEAD)
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


def _only(record: RecordDict, fields: Fields, kind: str, adapters: tuple[str, ...] = (), *others: str) -> None:
    """Raise WireError unless the message has exactly these records, and exactly the keys of its kind."""
    keys = _KEYS[kind] | {f"{key}.{what}" for key in adapters for what in ("modules", "scalings", "tensors")}
    odd = sorted(({_HEAD, *adapters, *others} ^ set(record)) | (keys ^ set(fields.head)))
    if odd:
        raise WireError(f"{fields.who}: the message lacks, or should not have, {short(odd)}")
