"""Exchange types <-> Flower records: dtype tags, and checks of every name, shape, dtype and value.

Arrays travel as `.npy` bytes and are read here without numpy's loader, so that nothing can be unpickled and
no header can ask for more memory than was sent. numpy has no bf16: its bits travel as int16 under a tag.
Every message names the protocol version and the base model's fingerprint.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fedlora.adapter import AdapterState, LoraFactors
from fedlora.codec import FLOATS, FORMATS, LARGEST, code, from_rows, pack, rows_of, sum_of, through, unpack
from fedlora.errors import WireError
from fedlora.exchange import Broadcast, ClientInfo, ClientUpdate

PROTOCOL = 1
REFUSED, STALE = 1001, 1002  # codes of a client's error reply: a clear refusal; folds that it no longer holds
_HEAD, _ADAPTER, _METRICS = "head", "adapter", "metrics"
_NUMPY = {"fp32": "float32", "fp16": "float16", "bf16": "int16", "int8": "int8", "int4": "uint8"}


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
    head = _checked_head(record, fingerprint, "the server")
    return Broadcast(
        round=_int(head, "round"),
        adapter=_get(record, head, _ADAPTER, "AB", "the server"),
        base_version=_int(head, "base-version"),
        folds=tuple(_get(record, head, f"fold-{i}", "AB", "the server") for i in range(_int(head, "folds"))),
        folds_from=_int(head, "folds-from"),
        trainable=frozenset(_str(head, "trainable")),
        upload=frozenset(_str(head, "upload")),
        personal=frozenset(_str(head, "personal")),
        steady=bool(_int(head, "steady")),
        task=_str(head, "task"),
    )


def encode_update(
    update: ClientUpdate,
    fingerprint: str,
    dtype: str = "fp32",
    upload: frozenset[str] = frozenset({"A", "B"}),
    known_base_version: int = 0,
) -> RecordDict:
    """A client's answer to a train message; only the factors in `upload` are sent.

    Args:
        update: its adapter is what was trained in fp32, and else the difference to what was sent (see `codec`).
        fingerprint: of the base model.
        dtype: one of `codec.FORMATS`.
        upload: as the broadcast says.
        known_base_version: the base version that this client will still hold next time.
    """
    head = _head(fingerprint, dtype) | {
        "client-id": update.client_id,
        "num-examples": update.num_examples,
        "base-version": update.base_version,
        "known-base-version": known_base_version,
    }
    record = RecordDict()
    _put(record, head, _ADAPTER, update.adapter, "".join(sorted(upload)))
    record[_HEAD] = ConfigRecord(head)
    record[_METRICS] = MetricRecord({name: float(value) for name, value in update.metrics.items()})
    return record


def decode_update(record: RecordDict, client_id: int, sent: Broadcast, fingerprint: str) -> Reply:
    """The answer as the server reads it, held against what this client was sent (see `as_received`).

    Raises:
        WireError: malformed, from another client or for another base version, a module, shape or scaling that
            differs from what was sent, a value that is not finite, or a weight that is not positive.
    """
    who = f"client {client_id}"
    head = _checked_head(record, fingerprint, who)
    _expect(who, "client id", _int(head, "client-id"), client_id)
    _expect(who, "base version", _int(head, "base-version"), sent.base_version)
    adapter = _get(record, head, _ADAPTER, "".join(sorted(sent.upload)), who, like=sent.adapter)
    _expect(who, "modules", sorted(adapter.lora), sorted(sent.adapter.lora))
    _expect(who, "dense tensors", sorted(adapter.dense), sorted(sent.adapter.dense))
    for module, factors in adapter.lora.items():
        mine = sent.adapter.lora[module]
        _expect(f"{module}: {who}", "scaling", factors.scaling, mine.scaling)
        for part in sent.upload:
            _expect(f"{module}: {who}", f"{part} shape", _shape(factors, part), _shape(mine, part))
    for name, tensor in adapter.dense.items():
        _expect(f"{name}: {who}", "shape", tuple(tensor.shape), tuple(sent.adapter.dense[name].shape))
    if head["dtype"] != "fp32":
        adapter = sum_of(adapter, sent.adapter)
    update = ClientUpdate(
        client_id=client_id,
        adapter=adapter,
        num_examples=_positive(head, "num-examples", who),
        base_version=sent.base_version,
        metrics=_metrics(record, who),
    )
    return Reply(update, known_base_version=_int(head, "known-base-version"))


def as_received(broadcast: Broadcast, dtype: str) -> Broadcast:
    """The broadcast as its client reads it: the adapter rounded to the number format that carried it."""
    return broadcast if dtype == "fp32" else replace(broadcast, adapter=through(broadcast.adapter, dtype))


def encode_hello(fingerprint: str) -> RecordDict:
    """The server's first question to a client, naming its base model."""
    return RecordDict({_HEAD: ConfigRecord(_head(fingerprint, "fp32"))})


def check_hello(record: RecordDict, fingerprint: str) -> None:
    """Raises WireError when the server speaks another protocol or has another base model."""
    _checked_head(record, fingerprint, "the server")


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
    }
    return RecordDict({_HEAD: ConfigRecord(cast("Any", head))})


def decode_info(record: RecordDict, fingerprint: str, who: str) -> ClientInfo:
    """A client's description of itself."""
    head = _checked_head(record, fingerprint, who)
    patterns, ranks = head.get("rank-pattern"), head.get("rank-pattern-ranks")
    if not isinstance(patterns, list) or not isinstance(ranks, list) or len(patterns) != len(ranks):
        raise WireError(f"{who}: malformed rank pattern {patterns!r}: {ranks!r}")
    return ClientInfo(
        client_id=_int(head, "client-id"),
        rank=_positive(head, "rank", who),
        alpha=_str(head, "alpha"),
        num_examples=_positive(head, "num-examples", who),
        rslora=bool(_int(head, "rslora")),
        rank_pattern=dict(zip(cast("list[str]", patterns), cast("list[int]", ranks), strict=True)),
    )


def encode_evaluation(num_examples: int, metrics: Mapping[str, float], fingerprint: str) -> RecordDict:
    """A client's answer to an evaluate message: sums of nothing, numbers only."""
    head = _head(fingerprint, "fp32") | {"num-examples": num_examples}
    return RecordDict(
        {_HEAD: ConfigRecord(cast("Any", head)), _METRICS: MetricRecord({k: float(v) for k, v in metrics.items()})}
    )


def decode_evaluation(record: RecordDict, fingerprint: str, who: str) -> tuple[int, dict[str, float]]:
    """`(num_examples, metrics)` of one client."""
    head = _checked_head(record, fingerprint, who)
    return _positive(head, "num-examples", who), _metrics(record, who)


def payload_bytes(record: RecordDict) -> int:
    """Bytes of all arrays in a message, headers of the arrays included."""
    return sum(len(array.data) for arrays in record.array_records.values() for array in arrays.values())


def _head(fingerprint: str, dtype: str) -> dict[str, Any]:
    return {"protocol": PROTOCOL, "base": fingerprint, "dtype": dtype}


def _checked_head(record: RecordDict, fingerprint: str, who: str) -> Mapping[str, Any]:
    head = record.config_records.get(_HEAD)
    if head is None:
        raise WireError(f"{who}: the message has no head record; is the other side FedLoRA?")
    if head.get("protocol") != PROTOCOL:
        raise WireError(
            f"{who} speaks protocol {head.get('protocol')!r}, this side {PROTOCOL}; install the same version of fedlora"
        )
    if head.get("base") != fingerprint:
        raise WireError(
            f"{who} has base model {head.get('base')!r}, this side {fingerprint!r}; use the same model.name and "
            "model.revision on both sides"
        )
    if head.get("dtype") not in FORMATS:
        raise WireError(f"{who}: unknown number format {head.get('dtype')!r}; expected one of {', '.join(FORMATS)}")
    return head


def _put(record: RecordDict, head: dict[str, Any], key: str, adapter: AdapterState, parts: str) -> None:
    """Adds one adapter to a message: its arrays, and its scalings in the head."""
    arrays: dict[str, Array] = {}
    for module, factors in adapter.lora.items():
        for part in parts:
            arrays |= _to_arrays(f"{module}|{part}", getattr(factors, part), head["dtype"], part)
    for name, tensor in adapter.dense.items():
        arrays |= _to_arrays(f"dense|{name}", tensor, head["dtype"], name)
    head[f"{key}.modules"] = list(adapter.lora)
    head[f"{key}.scalings"] = [float(factors.scaling) for factors in adapter.lora.values()]
    head[f"{key}.dense"] = list(adapter.dense)
    record[key] = ArrayRecord(arrays)


def _get(
    record: RecordDict, head: Mapping[str, Any], key: str, parts: str, who: str, *, like: AdapterState | None = None
) -> AdapterState:
    """Reads one adapter of a message; a factor that was not sent is empty.

    Args:
        record, head, key: the message, and where in it.
        parts: the factors that it should hold.
        who: sent it.
        like: tells the shapes of integer codes.
    """
    arrays = record.array_records.get(key)
    modules, scalings, dense = (head.get(f"{key}.{what}") for what in ("modules", "scalings", "dense"))
    if arrays is None or not all(isinstance(what, list) for what in (modules, scalings, dense)):
        raise WireError(f"{who}: the message has no {key!r} record")
    modules, scalings, dense = cast("list[str]", modules), cast("list[float]", scalings), cast("list[str]", dense)
    dtype = _str(head, "dtype")
    expected = {f"{module}|{part}" for module in modules for part in parts} | {f"dense|{name}" for name in dense}
    expected |= {f"{name}|scale" for name in expected} if dtype in LARGEST else set()
    if set(arrays) != expected or len(modules) != len(scalings) or len(set(modules)) != len(modules):
        odd = sorted(set(arrays) ^ expected)[:3]
        raise WireError(f"{who}: arrays and head of {key!r} do not agree, for instance on {odd}")
    if dtype in LARGEST and (like is None or not {*modules} <= {*like.lora} or not {*dense} <= {*like.dense}):
        raise WireError(f"{who}: integer codes for modules that it was not sent, or from a server")

    def read(name: str, part: str, model: Tensor | None) -> Tensor:
        where = f"{who}: {name}"
        if dtype in FLOATS:
            return _to_tensor(arrays[name], dtype, where)
        assert model is not None
        return _decoded(arrays[name], arrays[f"{name}|scale"], dtype, like=model, part=part, where=where)

    lora: dict[str, LoraFactors] = {}
    for module, scaling in zip(modules, scalings, strict=True):
        sent = like.lora.get(module) if like else None
        a = read(f"{module}|A", "A", sent and sent.A) if "A" in parts else torch.empty(0, 0)
        b = read(f"{module}|B", "B", sent and sent.B) if "B" in parts else torch.empty(0, 0)
        if a.ndim != 2 or b.ndim != 2 or (len(parts) == 2 and a.shape[0] != b.shape[1]):
            raise WireError(
                f"{module}: {who} sent A {tuple(a.shape)} and B {tuple(b.shape)}, expected [r, d_in] and [d_out, r]"
            )
        if not (isinstance(scaling, float) and math.isfinite(scaling) and scaling > 0):
            raise WireError(f"{module}: {who} sent scaling {scaling!r}, expected a positive number")
        lora[module] = LoraFactors(A=a, B=b, scaling=scaling)
    return AdapterState(
        lora=lora, dense={name: read(f"dense|{name}", name, like.dense.get(name) if like else None) for name in dense}
    )


def _to_arrays(key: str, tensor: Tensor, dtype: str, part: str) -> dict[str, Array]:
    """The arrays that carry one tensor: itself, or codes and scales."""
    where = key.removeprefix("dense|").replace("|", ".")
    if dtype in FLOATS:
        return {key: _to_array(tensor, dtype, where)}
    if not torch.isfinite(tensor).all():
        raise WireError(f"{where}: values are not finite; training diverged, lower train.lr")
    codes, scales = code(rows_of(tensor.detach().to("cpu"), part), LARGEST[dtype])
    packed = pack(codes) if dtype == "int4" else codes
    return {key: Array(packed.contiguous().numpy()), f"{key}|scale": Array(scales.numpy())}


def _to_array(tensor: Tensor, dtype: str, where: str) -> Array:
    narrow = tensor.detach().to("cpu", FLOATS[dtype]).contiguous()
    if not torch.isfinite(narrow).all():
        hint = "" if torch.isfinite(tensor).all() else "; training diverged, lower train.lr"
        raise WireError(f"{where}: values are not finite in {dtype}{hint or '; set wire.dtype = fp32 or bf16'}")
    return Array(narrow.view(torch.int16).numpy() if dtype == "bf16" else narrow.numpy())


def _decoded(codes: Array, scales: Array, dtype: str, *, like: Tensor, part: str, where: str) -> Tensor:
    rows = rows_of(like, part)
    width = (rows.shape[1] + 1) // 2 if dtype == "int4" else rows.shape[1]
    got, sizes = _read(codes, _NUMPY[dtype], where), _read(scales, "float32", f"{where} scales")
    if got.shape != (rows.shape[0], width) or sizes.shape != (rows.shape[0],):
        raise WireError(f"{where}: codes {tuple(got.shape)} with scales {tuple(sizes.shape)} do not fit what was sent")
    if not (torch.isfinite(sizes).all() and (sizes >= 0).all()):
        raise WireError(f"{where} holds scales that are negative or not finite")
    return from_rows((unpack(got, rows.shape[1]) if dtype == "int4" else got) * sizes[:, None], tuple(like.shape), part)


def _to_tensor(array: Array, dtype: str, where: str) -> Tensor:
    bits = _read(array, _NUMPY[dtype], where)
    tensor = (bits.view(torch.bfloat16) if dtype == "bf16" else bits).float()
    if not torch.isfinite(tensor).all():
        raise WireError(f"{where} holds values that are not finite")
    return tensor


def _read(array: Array, expected: str, where: str) -> Tensor:
    """The array's values, after its header and length were held against each other."""
    stream = io.BytesIO(array.data)
    try:
        if np.lib.format.read_magic(stream) != (1, 0):
            raise ValueError("not version 1.0")
        shape, fortran, kind = np.lib.format.read_array_header_1_0(stream)
        if fortran or kind != np.dtype(expected) or tuple(array.shape) != shape or array.dtype != kind.name:
            raise ValueError(f"declared {array.dtype} {array.shape}, holds {kind} {shape}, expected {expected}")
        if len(array.data) - stream.tell() != math.prod(shape) * kind.itemsize:
            raise ValueError(f"{len(array.data)} bytes do not hold {kind} {shape}")
        values = np.frombuffer(array.data, dtype=kind, offset=stream.tell()).reshape(shape)
    except Exception as error:  # whatever a peer sent, this side reports it and goes on
        raise WireError(f"{where} is malformed: {error}") from None
    return torch.from_numpy(values.copy())


def _metrics(record: RecordDict, who: str) -> dict[str, float]:
    metrics = dict(record.metric_records.get(_METRICS, MetricRecord()).items())
    for name, value in metrics.items():
        if isinstance(value, list) or not math.isfinite(value):
            raise WireError(f"{who}: metric {name!r} is {value!r}, expected one finite number")
    return cast("dict[str, float]", metrics)


def _shape(factors: LoraFactors, part: str) -> tuple[int, ...]:
    return tuple((factors.A if part == "A" else factors.B).shape)


def _expect(who: str, what: str, got: object, expected: object) -> None:
    if got != expected:
        raise WireError(f"{who} sent {what} {got}, expected {expected}")


def _int(head: Mapping[str, Any], key: str) -> int:
    value = head.get(key)
    if not isinstance(value, int) or value < 0:
        raise WireError(f"the message's {key!r} is {value!r}, expected an integer of at least 0")
    return value


def _positive(head: Mapping[str, Any], key: str, who: str) -> int:
    value = _int(head, key)
    if value < 1:
        raise WireError(f"{who} sent {key} {value}, expected at least 1")
    return value


def _str(head: Mapping[str, Any], key: str) -> str:
    value = head.get(key)
    if not isinstance(value, str):
        raise WireError(f"the message's {key!r} is {value!r}, expected text")
    return value
