"""Exchange types <-> Flower records: dtype tags, and checks of every name, shape, dtype and value.

The tensors of an adapter travel as one array of bytes in safetensors' format, which holds no code and whose header
cannot ask for more memory than was sent. numpy has no bf16: its bits travel as int16 under a tag.
Every message names the protocol version and the base model's fingerprint.

A client's reply can hold no more than its broadcast implies: names and shapes are compared before any value is
used. Nothing is ever allocated from a declared size. Metrics are a fixed list. Whatever a peer sent, what comes
out of a decoder is a value or a `WireError`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, TypeVar, cast

import numpy as np
import safetensors.numpy
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fedlora.adapters import AdapterState, LoraFactors
from fedlora.common.errors import ConfigError, WireError
from fedlora.config import LONGEST_CLASS, MOST_RANK, alpha_of
from fedlora.tasks.scores import METRICS

from .codec import FLOATS, FORMATS, LARGEST, code, combine, from_rows, pack, rows_of, through, unpack
from .messages import Broadcast, ClientInfo, ClientUpdate

PROTOCOL = 1
_Item = TypeVar("_Item")
Values = np.ndarray[Any, np.dtype[Any]]
TASKS = ("train", "gradient")
# Codes of a client's error reply: a clear refusal; folds that it no longer holds; a loss that is not finite.
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
    }
)
# A client may not claim any number: it is a weight in every mean, and the server allocates by ranks.
MOST_EXAMPLES = 10**9
MOST_CLASSES = 4096
_ROUNDING = 1e-6  # relative difference between one number in fp32 and in fp64, with room
_LARGEST_METRIC = 1e305  # a mean of such numbers is finite
_LARGEST_INT = 2**64 - 1  # Flower's node ids
_ROOM, _NAME = 1 << 20, 1024  # bytes of a reply beside its tensors, and of one tensor beside its values
_ENTRY = 256  # bytes of a tensor's entry in a header, beside its name
_SHORT = 120  # characters of a peer's own words in an error
_HEAD, _ADAPTER, _METRICS = "head", "adapter", "metrics"
_TENSORS = "tensors"
_NUMPY = {"fp32": "float32", "fp16": "float16", "bf16": "int16", "int8": "int8", "int4": "uint8"}
_COMMON = ("protocol", "base", "dtype")
_KEYS = MappingProxyType(
    {
        "broadcast": frozenset(
            {
                *_COMMON,
                *("round", "base-version", "folds-from", "folds"),
                *("trainable", "upload", "personal", "steady", "task", "run"),
            }
        ),
        "update": frozenset(
            {*_COMMON, "client-id", "num-examples", "base-version", "known-base-version", "round", "task"}
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


@dataclass(frozen=True)
class Reply:
    """A client's update, and the base version that the client will still hold next time."""

    update: ClientUpdate
    known_base_version: int


def encode_broadcast(broadcast: Broadcast, fingerprint: str, dtype: str = "fp32") -> RecordDict:
    """A train or evaluate message for one client.

    Raises:
        WireError: a value is not finite in this number format.
    """
    head = _head(fingerprint, dtype) | {
        "round": broadcast.round,
        "base-version": broadcast.base_version,
        "folds-from": broadcast.folds_from,
        "folds": len(broadcast.folds),
        "trainable": "".join(sorted(broadcast.trainable)),
        "upload": "".join(sorted(broadcast.upload)),
        "personal": "".join(sorted(broadcast.personal)),
        "steady": broadcast.steady,
        "task": broadcast.task,
        "run": broadcast.run,
    }
    record = RecordDict()
    _put(record, head, _ADAPTER, broadcast.adapter, "AB")
    for index, fold in enumerate(broadcast.folds):
        _put(record, head, f"fold-{index}", fold, "AB")
    record[_HEAD] = ConfigRecord(head)
    return record


def decode_broadcast(record: RecordDict, fingerprint: str) -> Broadcast:
    """The message as a client reads it.

    Raises:
        WireError: malformed, of another protocol, or made for another base model.
    """
    who = "the server"
    head = _checked_head(record, fingerprint, who)
    count = _int(head, "folds", who, most=len(record))
    keys = (_ADAPTER, *(f"fold-{i}" for i in range(count)))
    _only(record, head, "broadcast", who, keys)
    return Broadcast(
        round=_int(head, "round", who),
        adapter=_get(record, head, _ADAPTER, "AB", who),
        base_version=_int(head, "base-version", who),
        folds=tuple(_get(record, head, key, "AB", who) for key in keys[1:]),
        folds_from=_int(head, "folds-from", who),
        trainable=_letters(head, "trainable", "ABR", who),
        upload=_letters(head, "upload", "AB", who),
        personal=_letters(head, "personal", "AB", who),
        steady=_flag(head, "steady", who),
        task=_one_of(head, "task", TASKS, who),
        run=_run_key(head, who),
    )


def encode_update(
    update: ClientUpdate,
    fingerprint: str,
    dtype: str = "fp32",
    upload: frozenset[str] = frozenset({"A", "B"}),
    known_base_version: int = 0,
    *,
    round: int = 1,
    task: str = "train",
) -> RecordDict:
    """A client's answer to a train message; only the factors in `upload` are sent.

    Args:
        update: its adapter is what was trained in fp32, and else the difference to what was sent (see `codec`).
        fingerprint: of the base model.
        dtype: one of `codec.FORMATS`.
        upload: as the broadcast says.
        known_base_version: the base version that this client will still hold next time.
        round: that was answered, as the broadcast says.
        task: that was done, as the broadcast says.

    Raises:
        WireError: a value is not finite in this number format, or a metric is none of `TRAIN_METRICS`.
    """
    head = _head(fingerprint, dtype) | {
        "client-id": update.client_id,
        "num-examples": update.num_examples,
        "base-version": update.base_version,
        "known-base-version": known_base_version,
        "round": round,
        "task": task,
    }
    record = RecordDict()
    _put(record, head, _ADAPTER, update.adapter, "".join(sorted(upload)))
    record[_HEAD] = ConfigRecord(head)
    record[_METRICS] = _to_metrics(update.metrics, TRAIN_METRICS)
    return record


def decode_update(
    record: RecordDict, client_id: int, sent: Broadcast, fingerprint: str, most_examples: int = MOST_EXAMPLES
) -> Reply:
    """The answer as the server reads it, held against what this client was sent (see `as_received`).

    Args:
        record: the answer.
        client_id: whose answer it should be.
        sent: the broadcast as this client reads it.
        fingerprint: of the base model.
        most_examples: the largest weight that it may claim.

    Raises:
        WireError: malformed, from another client, for another round, task or base version, a module, shape or scaling
            that differs from what was sent, a value that is not finite, a weight that is not positive or too
            large, or metrics other than those of the list.
    """
    who = f"client {client_id}"
    head = _checked_head(record, fingerprint, who)
    _only(record, head, "update", who, (_ADAPTER,), _METRICS)
    _expect(who, "client id", _int(head, "client-id", who), client_id)
    _expect(who, "task", _str(head, "task", who), sent.task)
    _expect(who, "round", _int(head, "round", who), sent.round)
    _expect(who, "base version", _int(head, "base-version", who), sent.base_version)
    known = _int(head, "known-base-version", who)
    if known not in (0, sent.base_version):
        raise WireError(f"{who} sent known-base-version {known}, expected 0 or {sent.base_version}")
    examples = _positive(head, "num-examples", who, most_examples)
    metrics = _metrics(record, who, TRAIN_METRICS)
    adapter = _get(record, head, _ADAPTER, "".join(sorted(sent.upload)), who, like=sent.adapter)
    if head["dtype"] != "fp32":
        adapter = combine(_finite_sum(who), adapter, sent.adapter)
    _require(metrics, TRAIN_METRICS, who)
    update = ClientUpdate(
        client_id=client_id,
        adapter=adapter,
        num_examples=examples,
        base_version=sent.base_version,
        metrics=metrics,
    )
    return Reply(update, known_base_version=known)


def most_bytes(sent: Broadcast) -> int:
    """More than an answer to this broadcast can hold: every value in fp32, scales, headers, and some room."""
    return _ROOM + _value_bytes(sent.adapter) + _NAME * (2 * len(sent.adapter.lora) + len(sent.adapter.dense))


def _value_bytes(adapter: AdapterState) -> int:
    """More than the values of these tensors can take, coded or not: fp32, and a scale for every row or column."""
    tensors = [t for f in adapter.lora.values() for t in (f.A, f.B)] + [*adapter.dense.values()]
    return sum(4 * (t.numel() + sum(t.shape) + 1) for t in tensors)


def as_received(broadcast: Broadcast, dtype: str) -> Broadcast:
    """The broadcast as its client reads it: the adapter rounded to the number format that carried it."""
    return broadcast if dtype == "fp32" else replace(broadcast, adapter=through(broadcast.adapter, dtype))


def encode_hello(fingerprint: str) -> RecordDict:
    """The server's first question to a client, naming its base model."""
    return RecordDict({_HEAD: ConfigRecord(_head(fingerprint, "fp32"))})


def check_hello(record: RecordDict, fingerprint: str) -> None:
    """Raises WireError when the server speaks another protocol or has another base model."""
    _only(record, _checked_head(record, fingerprint, "the server"), "hello", "the server")


def encode_info(info: ClientInfo, fingerprint: str) -> RecordDict:
    """A client's answer to the server's first question: who are you, and what can you hold?"""
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
    """A client's description of itself.

    Raises:
        WireError: malformed, or a rank, an alpha or a number of examples that no client can have.
    """
    head = _checked_head(record, fingerprint, who)
    _only(record, head, "info", who)
    patterns, ranks = _list(head, "rank-pattern", str, who), _list(head, "rank-pattern-ranks", int, who)
    if len(patterns) != len(ranks) or not all(1 <= rank <= MOST_RANK for rank in ranks):
        raise WireError(f"{who}: malformed rank pattern {_short(patterns)}: {_short(ranks)}")
    rank, alpha = _positive(head, "rank", who, MOST_RANK), _str(head, "alpha", who)
    try:
        scale = alpha_of(alpha, rank)
    except ConfigError:
        scale = math.nan
    if not 0 < scale < math.inf:
        raise WireError(f"{who} sent alpha {_short(alpha)}, expected a number above 0 or such as '2r'")
    return ClientInfo(
        client_id=_int(head, "client-id", who),
        rank=rank,
        alpha=alpha,
        num_examples=_positive(head, "num-examples", who, MOST_EXAMPLES),
        rslora=_flag(head, "rslora", who),
        rank_pattern=dict(zip(patterns, ranks, strict=True)),
        class_names=_classes(head, who),
    )


def encode_evaluation(num_examples: int, metrics: Mapping[str, float], fingerprint: str) -> RecordDict:
    """A client's answer to an evaluate message: numbers only, by the names of `METRICS`."""
    head = _head(fingerprint, "fp32") | {"num-examples": num_examples}
    return RecordDict({_HEAD: ConfigRecord(cast("Any", head)), _METRICS: _to_metrics(metrics, METRICS)})


def decode_evaluation(
    record: RecordDict, fingerprint: str, who: str, most_examples: int = MOST_EXAMPLES
) -> tuple[int, dict[str, float]]:
    """`(num_examples, metrics)` of one client, which may claim so many examples at most."""
    head = _checked_head(record, fingerprint, who)
    _only(record, head, "evaluation", who, (), _METRICS)
    metrics = _metrics(record, who, METRICS)
    _require(metrics, {"loss", "accuracy"}, who)
    return _positive(head, "num-examples", who, most_examples), metrics


def payload_bytes(record: RecordDict) -> int:
    """Bytes of all tensors in a message, their headers included."""
    return sum(len(array.data) for arrays in record.array_records.values() for array in arrays.values())


def _head(fingerprint: str, dtype: str) -> dict[str, Any]:
    return {"protocol": PROTOCOL, "base": fingerprint, "dtype": dtype}


def _checked_head(record: RecordDict, fingerprint: str, who: str) -> Mapping[str, Any]:
    head = record.config_records.get(_HEAD)
    if head is None:
        raise WireError(f"{who}: the message has no head record; is the other side FedLoRA?")
    if head.get("protocol") != PROTOCOL:
        raise WireError(
            f"{who} speaks protocol {_short(head.get('protocol'))}, this side {PROTOCOL}; install the same version of "
            "fedlora"
        )
    if head.get("base") != fingerprint:
        raise WireError(
            f"{who} has base model {_short(head.get('base'))}, this side {fingerprint!r}; use the same model.name and "
            "model.revision on both sides"
        )
    if head.get("dtype") not in FORMATS:
        raise WireError(
            f"{who}: unknown number format {_short(head.get('dtype'))}; expected one of {', '.join(FORMATS)}"
        )
    return head


def _only(
    record: RecordDict, head: Mapping[str, Any], kind: str, who: str, adapters: tuple[str, ...] = (), *others: str
) -> None:
    """Raises WireError unless the message holds these records and the keys of its kind, and nothing else."""
    keys = _KEYS[kind] | {f"{key}.{what}" for key in adapters for what in ("modules", "scalings", "dense")}
    odd = sorted(({_HEAD, *adapters, *others} ^ set(record)) | (keys ^ set(head)))
    if odd:
        raise WireError(f"{who}: the message lacks, or should not have, {_short(odd)}")


def _put(record: RecordDict, head: dict[str, Any], key: str, adapter: AdapterState, parts: str) -> None:
    """Adds one adapter to a message: its tensors, and its scalings in the head.

    All tensors are one array of bytes, in safetensors' format: Flower moves each array by requests of its own.
    """
    arrays: dict[str, Values] = {}
    for module, factors in adapter.lora.items():
        for part in parts:
            arrays |= _to_arrays(f"{module}|{part}", getattr(factors, part), head["dtype"], part)
    for name, tensor in adapter.dense.items():
        arrays |= _to_arrays(f"dense|{name}", tensor, head["dtype"], name)
    head[f"{key}.modules"] = list(adapter.lora)
    head[f"{key}.scalings"] = [float(factors.scaling) for factors in adapter.lora.values()]
    head[f"{key}.dense"] = list(adapter.dense)
    data = safetensors.numpy.save(arrays)
    record[key] = ArrayRecord({_TENSORS: Array(dtype="uint8", shape=(len(data),), stype="safetensors", data=data)})


def _get(
    record: RecordDict, head: Mapping[str, Any], key: str, parts: str, who: str, *, like: AdapterState | None = None
) -> AdapterState:
    """Reads one adapter of a message; a factor that was not sent is empty.

    Args:
        record, head, key: the message, and where in it.
        parts: the factors that it should hold.
        who: sent it.
        like: what its names, scalings and shapes have to be; without it, they are the sender's to choose.
    """
    modules, dense = (_list(head, f"{key}.{what}", str, who) for what in ("modules", "dense"))
    scalings = _list(head, f"{key}.scalings", float, who)
    if len(modules) != len(scalings):
        raise WireError(f"{who}: the message has not one scaling for each module of {key!r}")
    if like is not None:
        _expect_names(who, "modules", modules, like.lora)
        _expect_names(who, "dense tensors", dense, like.dense)
    dtype = str(head["dtype"])
    expected = {f"{module}|{part}" for module in modules for part in parts} | {f"dense|{name}" for name in dense}
    expected |= {f"{name}|scale" for name in expected} if dtype in LARGEST else set()
    arrays = _tensors(record, key, who, expected, None if like is None else _value_bytes(like))
    if set(arrays) != expected or len(set(modules)) != len(modules) or len(set(dense)) != len(dense):
        odd = sorted(set(arrays) ^ expected)[:3]
        raise WireError(f"{who}: arrays and head of {key!r} do not agree, for instance on {_short(odd)}")
    if dtype in LARGEST and like is None:
        raise WireError(f"{who}: integer codes are for what clients send")

    def read(name: str, part: str, model: Tensor | None) -> Tensor:
        where = f"{who}: {name if len(name) <= _SHORT else _short(name)}"
        if dtype in LARGEST and model is not None:
            return _decoded(arrays[name], arrays[f"{name}|scale"], dtype, like=model, part=part, where=where)
        return _to_tensor(arrays[name], dtype, None if model is None else tuple(model.shape), where)

    lora: dict[str, LoraFactors] = {}
    given = dict(zip(modules, scalings, strict=True))
    for module in given if like is None else like.lora:
        scaling, sent = given[module], None if like is None else like.lora[module]
        if not 0 < scaling < math.inf:
            raise WireError(f"{_short(module)}: {who} sent scaling {scaling!r}, expected a positive number")
        if sent is not None:
            if not math.isclose(scaling, sent.scaling, rel_tol=_ROUNDING):  # it may have been computed in fp32
                _expect(f"{module}: {who}", "scaling", scaling, sent.scaling)
            scaling = sent.scaling
        a = read(f"{module}|A", "A", sent and sent.A) if "A" in parts else torch.empty(0, 0)
        b = read(f"{module}|B", "B", sent and sent.B) if "B" in parts else torch.empty(0, 0)
        if a.ndim != 2 or b.ndim != 2 or (len(parts) == 2 and a.shape[0] != b.shape[1]):
            raise WireError(
                f"{_short(module)}: {who} sent A {_short(tuple(a.shape))} and B {_short(tuple(b.shape))}, expected "
                "[r, d_in] and [d_out, r]"
            )
        lora[module] = LoraFactors(A=a, B=b, scaling=scaling)
    names = dense if like is None else like.dense
    return AdapterState(
        lora=lora, dense={name: read(f"dense|{name}", name, like.dense[name] if like else None) for name in names}
    )


def _tensors(record: RecordDict, key: str, who: str, names: Set[str], most: int | None) -> dict[str, Values]:
    """The tensors of one adapter by name; no more memory than what was sent is taken for them.

    A header is objects once it is read: it may name no more tensors than there should be, empty ones included.

    Args:
        record, key: the message, and where in it.
        who: sent it.
        names: of the tensors that it should hold.
        most: bytes of their values together; None where their shapes are the sender's to choose.
    """
    arrays = record.array_records.get(key)
    if arrays is None or list(arrays) != [_TENSORS]:
        raise WireError(f"{who}: the message has no {key!r} record of tensors")
    data = arrays[_TENSORS].data
    header, longest = int.from_bytes(data[:8], "little"), sum(len(name.encode()) + _ENTRY for name in names) + _ENTRY
    if longest < header <= len(data) - 8:
        raise WireError(
            f"{who}: the header of {key!r} is {header} bytes, and {len(names)} tensors need no more than {longest}"
        )
    if most is not None and len(data) - 8 - header > most:
        raise WireError(f"{who}: the tensors of {key!r} hold {len(data) - 8 - header} bytes, expected at most {most}")
    try:
        return safetensors.numpy.load(data)
    except Exception as error:  # whatever a peer sent, this side reports it and goes on
        raise WireError(f"{who}: the tensors of {key!r} are malformed: {_cut(str(error))}") from None


def _finite_sum(who: str) -> Callable[..., Tensor]:
    """What a client's change makes of what it was sent, refused where it leaves the finite numbers."""

    def add(name: str, change: Tensor, start: Tensor) -> Tensor:
        total = change + start
        if not torch.isfinite(total).all():
            raise WireError(f"{who}: {name}: what was sent and its change make values that are not finite")
        return total

    return add


def _to_arrays(key: str, tensor: Tensor, dtype: str, part: str) -> dict[str, Values]:
    """The arrays that carry one tensor: itself, or codes and scales."""
    where = key.removeprefix("dense|").replace("|", ".")
    if dtype in FLOATS:
        return {key: _to_array(tensor, dtype, where)}
    if not torch.isfinite(tensor).all():
        raise WireError(f"{where}: values are not finite")
    codes, scales = code(rows_of(tensor.detach().to("cpu"), part), LARGEST[dtype])
    packed = pack(codes) if dtype == "int4" else codes
    return {key: packed.contiguous().numpy(), f"{key}|scale": scales.contiguous().numpy()}


def _to_array(tensor: Tensor, dtype: str, where: str) -> Values:
    narrow = tensor.detach().to("cpu", FLOATS[dtype]).contiguous()
    if not torch.isfinite(narrow).all():
        hint = "; set wire.dtype = fp32 or bf16" if torch.isfinite(tensor).all() else ""
        raise WireError(f"{where}: values are not finite in {dtype}{hint}")
    return narrow.view(torch.int16).numpy() if dtype == "bf16" else narrow.numpy()


def _decoded(codes: Values, scales: Values, dtype: str, *, like: Tensor, part: str, where: str) -> Tensor:
    rows = rows_of(like, part)
    width = (rows.shape[1] + 1) // 2 if dtype == "int4" else rows.shape[1]
    got = _read(codes, _NUMPY[dtype], (rows.shape[0], width), where)
    sizes = _read(scales, "float32", (rows.shape[0],), f"{where} scales")
    if not (torch.isfinite(sizes).all() and (sizes >= 0).all()):
        raise WireError(f"{where} holds scales that are negative or not finite")
    tensor = (unpack(got, rows.shape[1]) if dtype == "int4" else got) * sizes[:, None]
    if not torch.isfinite(tensor).all():
        raise WireError(f"{where} holds scales that are too large")
    return from_rows(tensor, tuple(like.shape), part)


def _to_tensor(array: Values, dtype: str, shape: tuple[int, ...] | None, where: str) -> Tensor:
    bits = _read(array, _NUMPY[dtype], shape, where)
    tensor = (bits.view(torch.bfloat16) if dtype == "bf16" else bits).float()
    if not torch.isfinite(tensor).all():
        raise WireError(f"{where} holds values that are not finite")
    return tensor


def _read(array: Values, expected: str, wanted: tuple[int, ...] | None, where: str) -> Tensor:
    """The values, once their number format is what the message says, and their shape is `wanted`."""
    if array.dtype != np.dtype(expected):
        raise WireError(f"{where} is malformed: it holds {array.dtype}, expected {expected}")
    if wanted is not None and array.shape != wanted:
        raise WireError(f"{where} is malformed: shape {_short(array.shape)}, expected {wanted}")
    return torch.from_numpy(array)


def _to_metrics(metrics: Mapping[str, float], known: frozenset[str]) -> MetricRecord:
    unknown = sorted(set(metrics) - known)
    if unknown:
        raise WireError(f"metric {unknown[0]!r} is not sent; clients send only {', '.join(sorted(known))}")
    return MetricRecord({name: float(value) for name, value in metrics.items()})


def _metrics(record: RecordDict, who: str, known: Set[str]) -> dict[str, float]:
    """The metrics of a message: one finite number each, by names that both sides know."""
    sent = record.metric_records.get(_METRICS)
    if sent is None:
        raise WireError(f"{who}: the message has no {_METRICS!r} record")
    metrics: dict[str, float] = {}
    for name, value in sent.items():
        if name not in known:
            raise WireError(f"{who} sent metric {_short(name)}, expected only {', '.join(sorted(known))}")
        if isinstance(value, list) or not -_LARGEST_METRIC <= value <= _LARGEST_METRIC:
            raise WireError(f"{who}: metric {name!r} is {_short(value)}, expected one finite number")
        metrics[name] = value
    return metrics


def _require(metrics: Mapping[str, float], names: Set[str], who: str) -> None:
    """Raises WireError unless these metrics, which this side reads, were sent."""
    if lacking := sorted(names - metrics.keys()):
        raise WireError(f"{who} left out metric {lacking[0]!r}, expected {', '.join(sorted(names))}")


def _expect(who: str, what: str, got: object, expected: object) -> None:
    if got != expected:
        raise WireError(f"{who} sent {what} {_short(got)}, expected {expected}")


def _expect_names(who: str, what: str, got: list[str], expected: Mapping[str, object]) -> None:
    """Raises WireError unless these are the names, each once, in any order."""
    if len(got) != len(expected) or set(got) != set(expected):
        lacks, has = sorted(set(expected) - set(got))[:3], sorted(set(got) - set(expected))[:3]
        raise WireError(
            f"{who} sent {what} other than it was sent: {len(got)} for {len(expected)}, without {_short(lacks)}, with "
            f"{_short(has)}"
        )


def _int(head: Mapping[str, Any], key: str, who: str, most: int = _LARGEST_INT) -> int:
    value = head.get(key)
    if type(value) is not int or not 0 <= value <= most:
        raise WireError(f"{who} sent {key} {_short(value)}, expected an integer from 0 to {most}")
    return value


def _positive(head: Mapping[str, Any], key: str, who: str, most: int) -> int:
    value = _int(head, key, who, most)
    if value < 1:
        raise WireError(f"{who} sent {key} {value}, expected at least 1")
    return value


def _flag(head: Mapping[str, Any], key: str, who: str) -> bool:
    value = head.get(key)
    if type(value) is not bool:
        raise WireError(f"{who} sent {key} {_short(value)}, expected true or false")
    return value


def _str(head: Mapping[str, Any], key: str, who: str) -> str:
    value = head.get(key)
    if not isinstance(value, str):
        raise WireError(f"{who} sent {key} {_short(value)}, expected text")
    return value


def _one_of(head: Mapping[str, Any], key: str, known: tuple[str, ...], who: str) -> str:
    value = _str(head, key, who)
    if value not in known:
        raise WireError(f"{who} sent {key} {_short(value)}, expected {' or '.join(known)}")
    return value


def _classes(head: Mapping[str, Any], who: str) -> tuple[str, ...]:
    names = _list(head, "class-names", str, who)
    if len(names) > MOST_CLASSES or not all(name.isprintable() and 0 < len(name) <= LONGEST_CLASS for name in names):
        raise WireError(
            f"{who} sent class-names {_short(names)}, expected at most {MOST_CLASSES} names of at most {LONGEST_CLASS} "
            "characters"
        )
    return tuple(names)


def _letters(head: Mapping[str, Any], key: str, known: str, who: str) -> frozenset[str]:
    value = frozenset(_str(head, key, who))
    if not value <= set(known):
        raise WireError(f"{who} sent {key} {_short(head[key])}, expected letters of {known}")
    return value


def _run_key(head: Mapping[str, Any], who: str) -> str:
    """It names a folder on the client: nothing but letters and digits."""
    key = _str(head, "run", who)
    if not re.fullmatch(r"[0-9a-z]{0,32}", key):
        raise WireError(f"{who} sent the run key {_short(key)}, expected at most 32 letters and digits")
    return key


def _list(head: Mapping[str, Any], key: str, kind: type[_Item], who: str) -> list[_Item]:
    value = head.get(key)
    if not isinstance(value, list) or not all(type(item) is kind for item in value):
        raise WireError(f"{who} sent {key} {_short(value)}, expected a list of {kind.__name__}")
    return value


def _short(value: object) -> str:
    """What a peer sent, for a message: no longer than a line, and without control characters."""
    try:
        return _cut(repr(value))
    except ValueError:  # an integer of thousands of digits
        return f"a {type(value).__name__} that is too long to show"


def _cut(text: str) -> str:
    return text if len(text) <= _SHORT else f"{text[: _SHORT - 3]}..."
