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
from fedlora.adapters.sketched_sum import Sketch
from fedlora.common.errors import ConfigError, WireError
from fedlora.config import MOST_RANK, alpha_of

from . import sketches
from .arrays import finite_sum, get, put, value_bytes
from .codec import SPARSE, round_trip
from .fields import METRICS_RECORD, Fields, metrics_record, read_metrics, require, short
from .heads import COMMON, HEAD, checked_head, head_of, only
from .messages import Broadcast, ClientInfo, ClientUpdate, Masking, Plan, SecondQuestion, Term
from .secure import payload

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
# Those that depend on single rows; with privacy.level = example they are not sent.
OF_ROWS = frozenset({"train-loss", "train-last-loss", "train-tokens", "train-cut"})
# The largest number of examples that a client may claim, since this number is its weight in every mean.
MOST_EXAMPLES = 10**9
_ROOM, _NAME = 1 << 20, 1024  # allowed bytes of a reply besides its tensors, and of a tensor besides its values
_ADAPTER, _CONTROL = "adapter", "control"
_TERMS = ("terms", "term-weights", "term-values")
_MASK = ("mask-session", "mask-weight", "mask-clients", "mask-neighbours", "mask-modules", "mask-ranks")
_SKETCH = ("sketch-width", "sketch-passes", "sketch-seed", "sketch-rank")
_MOST_SUMMED = 1 << 24  # clients in a secure sum
_MOST_WIDTH, _MOST_SEED = 1 << 16, (1 << 53) - 1
_KEYS = MappingProxyType(
    {
        "broadcast": frozenset(
            {
                *COMMON,
                *("round", "base-version", "folds-from", "folds"),
                *("train", "send", "keep", "frozen", "modules", "all-modules", *_TERMS, "begun", "span", "steady"),
                *("job", "run", "probe", "control", "counted"),
                *_SKETCH,
                *_MASK,
            }
        ),
        "second": frozenset({*COMMON, "round", "run", "modules", "all-modules", *_SKETCH}),
        "answer": frozenset({*COMMON, "client-id", "round"}),
        "update": frozenset(
            {*COMMON, "client-id", "num-examples", "base-version", "known-base-version", "round", "job"}
        ),
        "hello": COMMON,
        "info": frozenset(
            {
                *COMMON,
                *("client-id", "rank", "alpha", "num-examples"),
                *("rslora", "rank-pattern", "rank-pattern-ranks", "class-names", "edges"),
            }
        ),
        "evaluation": frozenset({*COMMON, "num-examples"}),
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
    head = head_of(fingerprint, SPARSE if broadcast.sparse else dtype) | {
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
        **_sketch_fields(broadcast.plan.sketch),
        **_mask_fields(broadcast.masking),
    }
    record = RecordDict()
    put(record, head, _ADAPTER, broadcast.adapter)
    for index, fold in enumerate(broadcast.folds):
        put(record, head, f"fold-{index}", fold)
    if broadcast.control is not None:
        put(record, head, _CONTROL, broadcast.control)
    record[HEAD] = ConfigRecord(head)
    return record


@_timed
def decode_broadcast(record: RecordDict, fingerprint: str) -> Broadcast:
    """The broadcast in a message, as a client reads it.

    Raises:
        WireError: the message is malformed, of another protocol version, or made for another base model.
    """
    who = "the server"
    fields = checked_head(record, fingerprint, who)
    count = fields.integer("folds", most=len(record))
    keys = (_ADAPTER, *(f"fold-{i}" for i in range(count)))
    controlled = fields.flag("control")
    only(record, fields, _KEYS["broadcast"], (*keys, _CONTROL) if controlled else keys)
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
            sketch=_sketch(fields),
        ),
        steady=fields.flag("steady"),
        job=fields.name("job"),
        run=fields.run_key(),
        probe=tuple(fields.numbers("probe")),
        control=get(record, fields, _CONTROL, train, like=trained) if controlled else None,
        counted=fields.integer("counted"),
        masking=_masking(fields),
    )


def _terms(fields: Fields) -> tuple[Term, ...]:
    names, numbers = fields.items(_TERMS[0], str), [fields.numbers(key) for key in _TERMS[1:]]
    if any(len(each) != len(names) for each in numbers):
        raise WireError(f"{fields.who}: malformed terms of the loss {short(names)}: {short(numbers)}")
    return tuple(itertools.starmap(Term, zip(names, *numbers, strict=True)))


def _sketch_fields(sketch: Sketch | None) -> dict[str, Any]:
    sizes = (0, 0, 0, 0) if sketch is None else (sketch.width, sketch.passes, sketch.seed, sketch.rank)
    return dict(zip(_SKETCH, sizes, strict=True))


def _sketch(fields: Fields) -> Sketch | None:
    most = (_MOST_WIDTH, 2, _MOST_SEED, MOST_RANK)
    width, passes, seed, rank = (fields.integer(key, limit) for key, limit in zip(_SKETCH, most, strict=True))
    if bool(width) != bool(passes):
        raise WireError(f"{fields.who} sent sketch-width {width} and sketch-passes {passes}, expected both or neither")
    return Sketch(width, passes, seed, rank) if width else None


def _mask_fields(masking: Masking | None) -> dict[str, Any]:
    if masking is None:
        return dict(zip(_MASK, ("", 0.0, 0, [], [], []), strict=True))
    ranks = masking.ranks
    values = (
        masking.session,
        masking.weight,
        masking.clients,
        list(masking.neighbours),
        list(ranks),
        [*ranks.values()],
    )
    return dict(zip(_MASK, values, strict=True))


def _masking(fields: Fields) -> Masking | None:
    session, weight, clients, neighbours, modules, ranks = _MASK
    if not fields.text(session):
        return None
    share = fields.number(weight)
    if not 0 < share <= 1:
        raise WireError(f"{fields.who} sent {weight} {share}, expected a number above 0 and at most 1")
    names, widths = fields.items(modules, str), fields.items(ranks, int)
    if len(names) != len(widths) or not all(1 <= width <= MOST_RANK for width in widths):
        raise WireError(f"{fields.who} sent malformed ranks of a secure sum {short(names)}: {short(widths)}")
    return Masking(
        session=fields.session(session),
        weight=share,
        clients=fields.positive(clients, _MOST_SUMMED),
        neighbours=tuple(fields.items(neighbours, int)),
        ranks=dict(zip(names, widths, strict=True)),
    )


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
    head = head_of(fingerprint, dtype) | {
        "client-id": update.client_id,
        "num-examples": update.num_examples,
        "base-version": update.base_version,
        "known-base-version": known_base_version,
        "round": number,
        "job": job,
    }
    record = RecordDict()
    put(record, head, _ADAPTER, keep_factors(update.adapter, send))
    record[HEAD] = ConfigRecord(head)
    record[METRICS_RECORD] = metrics_record(update.metrics, TRAIN_METRICS)
    return record


@_timed
def decode_update(
    record: RecordDict,
    client_id: int,
    sent: Broadcast,
    fingerprint: str,
    most_examples: int = MOST_EXAMPLES,
    *,
    private: bool = False,
) -> Reply:
    """The update in a client's answer, after a comparison with the broadcast to this client.

    Args:
        record: the answer.
        client_id: the client that should have sent it.
        sent: the broadcast as this client received it; see `as_received`.
        fingerprint: the base model's fingerprint.
        most_examples: the largest number of examples that the client may claim.
        private: True if the run protects single rows, so that no metric of `OF_ROWS` may be sent.

    Raises:
        WireError: the answer is malformed, or is from another client or for another round, job or base version; a
            module, shape or scaling differs from the broadcast; a value is not finite; the number of examples is not
            positive or too large; or a metric is unknown or missing.
    """
    who = f"client {client_id}"
    fields = checked_head(record, fingerprint, who)
    only(record, fields, _KEYS["update"], (_ADAPTER,), (METRICS_RECORD,))
    fields.expect("client id", fields.integer("client-id"), client_id)
    fields.expect("job", fields.text("job"), sent.job)
    fields.expect("round", fields.integer("round"), sent.round)
    fields.expect("base version", fields.integer("base-version"), sent.base_version)
    known = fields.integer("known-base-version")
    if known not in (0, sent.base_version):
        raise WireError(f"{who} sent known-base-version {known}, expected 0 or {sent.base_version}")
    examples = fields.positive("num-examples", most_examples)
    expected = TRAIN_METRICS - OF_ROWS if private else TRAIN_METRICS
    metrics = read_metrics(record, who, expected)
    if sent.plan.sketch is not None:
        fields.expect("number format", fields.head["dtype"], "fp32")
    adapter = get(record, fields, _ADAPTER, sent.plan.send, like=sketches.asked(sent.plan, sent.adapter))
    if fields.head["dtype"] != "fp32":
        adapter = map_tensors(finite_sum(fields.who), adapter, sent.adapter)
    require(metrics, expected, who)
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
    if sent.masking:
        return _ROOM + 8 * payload.count(payload.asked(sent, sent.masking.ranks))
    return bytes_for(sent.adapter if sent.plan.sketch is None else sketches.asked(sent.plan, sent.adapter))


def bytes_for(adapter: AdapterState) -> int:
    """An upper bound for the bytes of an answer with these tensors."""
    return _ROOM + value_bytes(adapter) + _NAME * len(OWN.put(adapter))


@_timed
def encode_second(question: SecondQuestion, fingerprint: str) -> RecordDict:
    """The second question of a round, in fp32: a basis that is rounded further would span another space."""
    head = head_of(fingerprint, "fp32") | {
        "round": question.round,
        "run": question.run,
        "modules": sorted(question.plan.modules or ()),
        "all-modules": question.plan.modules is None,
        **_sketch_fields(question.plan.sketch),
    }
    record = RecordDict()
    put(record, head, _ADAPTER, question.bases)
    record[HEAD] = ConfigRecord(head)
    return record


@_timed
def decode_second(record: RecordDict, fingerprint: str) -> SecondQuestion:
    """The second question, as a client reads it. Its plan says which modules it is about, and how they are sketched.

    Raises:
        WireError: the message is malformed, of another protocol version, made for another base model, or about a sketch
            of one pass.
    """
    fields = checked_head(record, fingerprint, "the server")
    only(record, fields, _KEYS["second"], (_ADAPTER,))
    sketch = _sketch(fields)
    if sketch is None or sketch.passes != 2:
        raise WireError("the server asked a second question about what is not sketched in two passes")
    modules = None if fields.flag("all-modules") else frozenset(fields.items("modules", str))
    return SecondQuestion(
        round=fields.integer("round"),
        bases=get(record, fields, _ADAPTER, ()),
        plan=Plan(modules=modules, sketch=sketch),
        run=fields.run_key(),
    )


@_timed
def encode_answer(client_id: int, number: int, adapter: AdapterState, fingerprint: str) -> RecordDict:
    """A client's answer to the second question of a round."""
    head = head_of(fingerprint, "fp32") | {"client-id": client_id, "round": number}
    record = RecordDict()
    put(record, head, _ADAPTER, adapter)
    record[HEAD] = ConfigRecord(cast("Any", head))
    return record


@_timed
def decode_answer(
    record: RecordDict, client_id: int, number: int, like: AdapterState, fingerprint: str
) -> AdapterState:
    """The tensors in a client's answer to the second question.

    Args:
        record: the answer.
        client_id: the client that should have sent it.
        number: number of the round.
        like: the names and shapes that are expected; see `sketches.asked`.
        fingerprint: the base model's fingerprint.

    Raises:
        WireError: the answer is malformed, or is from another client or for another round; a name or shape differs from
            what was asked; or a value is not finite.
    """
    fields = checked_head(record, fingerprint, f"client {client_id}")
    only(record, fields, _KEYS["answer"], (_ADAPTER,))
    fields.expect("client id", fields.integer("client-id"), client_id)
    fields.expect("round", fields.integer("round"), number)
    fields.expect("number format", fields.head["dtype"], "fp32")
    return get(record, fields, _ADAPTER, (), like=like)


@_timed
def as_received(broadcast: Broadcast, dtype: str) -> Broadcast:
    """The broadcast as its client receives it, with the adapter rounded to the message's number format."""
    if dtype == "fp32" or broadcast.sparse:
        return broadcast
    return replace(broadcast, adapter=round_trip(broadcast.adapter, dtype))


def encode_hello(fingerprint: str) -> RecordDict:
    """The server's first question to a client, naming its base model."""
    return RecordDict({HEAD: ConfigRecord(head_of(fingerprint, "fp32"))})


def check_hello(record: RecordDict, fingerprint: str) -> None:
    """Raise WireError if the server has another protocol version or another base model."""
    only(record, checked_head(record, fingerprint, "the server"), _KEYS["hello"])


def encode_info(info: ClientInfo, fingerprint: str) -> RecordDict:
    """A client's answer to the server's first question: its description."""
    head = head_of(fingerprint, "fp32") | {
        "client-id": info.client_id,
        "rank": info.rank,
        "alpha": str(info.alpha),
        "num-examples": info.num_examples,
        "rslora": info.rslora,
        "rank-pattern": list(info.rank_pattern),
        "rank-pattern-ranks": list(info.rank_pattern.values()),
        "class-names": list(info.class_names),
        "edges": list(info.edges),
    }
    return RecordDict({HEAD: ConfigRecord(cast("Any", head))})


def decode_info(record: RecordDict, fingerprint: str, who: str) -> ClientInfo:
    """The description in a client's answer.

    Raises:
        WireError: the answer is malformed, or its rank, alpha or number of examples is out of bounds.
    """
    fields = checked_head(record, fingerprint, who)
    only(record, fields, _KEYS["info"])
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
        edges=fields.edges(),
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
    head = head_of(fingerprint, "fp32") | {"num-examples": num_examples}
    return RecordDict({HEAD: ConfigRecord(cast("Any", head)), METRICS_RECORD: metrics_record(metrics, names)})


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
        private: True if the run protects single rows, so that no metric of `OF_ROWS` may be sent.

    Raises:
        WireError: the answer is malformed, or a value is out of bounds.
    """
    fields = checked_head(record, fingerprint, who)
    only(record, fields, _KEYS["evaluation"], (), (METRICS_RECORD,))
    metrics = read_metrics(record, who, names)
    require(metrics, names & {"loss", "accuracy"}, who)
    return fields.positive("num-examples", most_examples), metrics


def tokens_of(record: RecordDict) -> int:
    """The number of tokens on which a client says that it trained; 0 where it does not say it."""
    if METRICS_RECORD not in record.metric_records:
        return 0
    said = record.metric_records[METRICS_RECORD].get("train-tokens", 0)
    return int(said) if isinstance(said, int | float) else 0


def payload_bytes(record: RecordDict) -> int:
    """The number of bytes of all tensors in a message, with their headers."""
    return sum(len(array.data) for arrays in record.array_records.values() for array in arrays.values())
