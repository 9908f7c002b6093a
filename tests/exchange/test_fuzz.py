"""Thousands of spoiled messages: a decoder gives a value or a WireError, at once and in little memory."""

from __future__ import annotations

import copy
import random
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedlora.adapters import AdapterState, LoraFactors
from fedlora.common.errors import WireError
from fedlora.exchange import Broadcast, ClientInfo, ClientUpdate, Masking, secure_messages, wire
from fedlora.exchange.secure.keys import PublicKeys
from fedlora.exchange.secure_messages import Question
from tests.federation import METRICS

BASE, EACH = "abc123", 1200
_STRANGE: list[Any] = [
    *(0, -1, 1, 2**31, 2**63, 10**400, 0.0, -1.5, 1e308, float("nan"), float("inf"), True, False),
    *("", "x", "fp32", "int4", "A", "ABAB", "../../etc", "x" * 5000, "\x1b[2J", "\x00", "é" * 50, b"", b"\x80\x04N."),
    *([], [1], ["x"], [1.0], [True], [b""], ["layers.0.q_proj"] * 3, [10**400], ["y"] * 3000, [-(2**63)]),
]


def _state(seed: int, tensors: bool = True) -> AdapterState:
    g = torch.Generator().manual_seed(seed)
    lora = {
        f"layers.{i}.q_proj": LoraFactors(torch.randn(3, 6, generator=g), torch.randn(5, 3, generator=g), 2.0)
        for i in range(2)
    }
    return AdapterState(lora=lora, tensors={"head.weight": torch.randn(2, 3, generator=g)} if tensors else {})


SENT = Broadcast(round=1, adapter=_state(0), base_version=2, folds=(_state(2, tensors=False),), folds_from=1)
SESSION, KEYS = "ab" * 16, PublicKeys(b"m" * 32, b"l" * 32, b"s" * 32, b"n" * 135)
MASKED = replace(SENT, masking=Masking(SESSION, 0.5, 10, (1, 2), {"layers.0.q_proj": 3}))
STEERED = replace(SENT, control=_state(3, tensors=False), counted=1)
UPDATE = ClientUpdate(client_id=7, adapter=_state(1), num_examples=10, base_version=2, metrics=METRICS)
INFO = ClientInfo(client_id=3, rank=8, alpha="2r", num_examples=40, rank_pattern={"k_proj": 2})

DECODERS: dict[str, tuple[list[RecordDict], Callable[[RecordDict], object]]] = {
    "broadcast": (
        [wire.encode_broadcast(SENT, BASE, dtype) for dtype in ("fp32", "bf16")]
        + [wire.encode_broadcast(each, BASE) for each in (STEERED, MASKED)],
        lambda record: wire.decode_broadcast(record, BASE),
    ),
    "update": (
        [wire.encode_update(UPDATE, BASE, dtype) for dtype in ("fp32", "bf16", "int8", "int4", "sparse")],
        lambda record: wire.decode_update(record, 7, SENT, BASE),
    ),
    "info": ([wire.encode_info(INFO, BASE)], lambda record: wire.decode_info(record, BASE, "node 1")),
    "evaluation": (
        [wire.encode_evaluation(12, {"loss": 0.5, "accuracy": 1.0}, BASE, frozenset({"loss", "accuracy"}))],
        lambda record: wire.decode_evaluation(record, BASE, "client 0", frozenset({"loss", "accuracy"})),
    ),
    "question": (
        [secure_messages.encode_question(Question(1, "r", SESSION, {4: KEYS}, {4: b"x"}, frozenset({4})), BASE)],
        lambda record: secure_messages.decode_question(record, BASE),
    ),
    "keys": (
        [secure_messages.encode_keys(7, SESSION, KEYS, BASE)],
        lambda record: secure_messages.decode_keys(record, 7, SESSION, BASE),
    ),
    "letters": (
        [secure_messages.encode_letters(7, SESSION, {1: b"x", 2: b"y"}, BASE)],
        lambda record: secure_messages.decode_letters(record, 7, SESSION, BASE),
    ),
    "masked": (
        [secure_messages.encode_masked(UPDATE, np.zeros(9, np.uint64), MASKED, BASE)],
        lambda record: secure_messages.decode_masked(record, 7, MASKED, BASE, count=9, most_examples=10),
    ),
    "hello": ([wire.encode_hello(BASE)], lambda record: wire.check_hello(record, BASE)),
}


def _spoil(record: RecordDict, rng: random.Random) -> None:
    """One change at random; Flower's own type checks may refuse to build some, as they would on arrival."""
    arrays = any(record.array_records.values())
    kinds = [_spoil_head, _spoil_head, _spoil_records, _spoil_metrics]
    rng.choice([*kinds, _spoil_array, _spoil_array, _spoil_array] if arrays else kinds)(record, rng)


def _spoil_head(record: RecordDict, rng: random.Random) -> None:
    head = record.config_records.get("head")
    if head:
        key = rng.choice([*head, "more"])
        if rng.random() < 0.2:
            head.pop(key, None)
        else:
            head[key] = copy.copy(rng.choice(_STRANGE))


def _spoil_records(record: RecordDict, rng: random.Random) -> None:
    key = rng.choice([*record, "fold-1", "metrics", "junk"])
    if key in record and rng.random() < 0.5:
        del record[key]
    else:
        other: list[Any] = [ArrayRecord(), MetricRecord(), ConfigRecord(), MetricRecord({"loss": 1.0})]
        record[key] = rng.choice([*other, *record.values()])


def _spoil_metrics(record: RecordDict, rng: random.Random) -> None:
    metrics = record.metric_records.get("metrics")
    if metrics is not None:
        values = [v for v in _STRANGE if type(v) in (int, float)] + [[1, 2], [0.5], []]
        metrics[rng.choice([*metrics, "secret", "x" * 5000, "\x1b[2J"])] = rng.choice(values)


def _spoil_array(record: RecordDict, rng: random.Random) -> None:
    """The bytes that carry an adapter's tensors, or what Flower says of them."""
    arrays = rng.choice(list(record.array_records.values()))
    if not arrays:
        return
    name = rng.choice(list(arrays))
    old = arrays[name]
    data, dtype, shape, stype = bytearray(old.data), old.dtype, old.shape, old.stype
    header = 8 + int.from_bytes(old.data[:8], "little")
    match rng.randrange(10):
        case 0:
            for _ in range(rng.randint(1, 8)):
                data[rng.randrange(len(data))] = rng.randrange(256)
        case 1 | 2:
            for _ in range(rng.randint(1, 3)):
                data[rng.randrange(min(header, len(data)))] = rng.choice(b'0129[]{}",:|ABF')
        case 3:
            del data[rng.randrange(len(data)) :]
        case 4:
            data += bytes(rng.randrange(1, 2000))
        case 5:
            data[:8] = rng.choice([0, 1, 2**31, 2**63, 2**64 - 1, header % 2**64]).to_bytes(8, "little")
        case 6:
            old_text = rng.choice([b"[3,6]", b"[5,3]", b'"F32"', b'"data_offsets"', b"layers.0"])
            new_text = rng.choice([b"[99999999,9999999]", b"[-3,-6]", b'"F64"', b'"X"', b"[" * 2000, b"[0]", b"1e999"])
            data = bytearray(bytes(data).replace(old_text, new_text))
            data[:8] = max(0, header - 8 + len(data) - len(old.data)).to_bytes(8, "little")
        case 7:
            dtype, shape = rng.choice(["object", "V9999999999", ""]), rng.choice([(10**9, 10**9), (-1,), ()])
        case 8:
            stype = rng.choice(["numpy.ndarray", "", "x" * 3000])
        case _:
            arrays[rng.choice(["junk", "layers.9.q_proj|A", "tensors|x", "é" * 2000])] = arrays.pop(name)
            return
    arrays[name] = Array(dtype=dtype, shape=shape, stype=stype, data=bytes(data))


@pytest.mark.parametrize("kind", list(DECODERS))
def test_a_decoder_gives_a_value_or_a_wire_error(kind):
    """5 x 1,200 messages with one to four changes each."""
    messages, decode = DECODERS[kind]
    rng = random.Random(kind)
    spoiled: list[RecordDict] = []
    while len(spoiled) < EACH:
        record = copy.deepcopy(rng.choice(messages))
        try:
            for _ in range(rng.randint(1, 4)):
                _spoil(record, rng)
        except (TypeError, ValueError):
            continue
        spoiled.append(record)
    said: list[str] = []
    began = time.process_time()
    tracemalloc.start()
    try:
        for record in spoiled:
            try:
                decode(record)
            except WireError as error:
                said.append(str(error))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(said) > EACH / 2
    assert max(map(len, said)) < 1500
    assert peak < 32 * 2**20
    assert time.process_time() - began < 20


@pytest.mark.parametrize("kind", list(DECODERS))
def test_what_is_not_spoiled_is_decoded(kind):
    messages, decode = DECODERS[kind]
    for message in messages:
        decode(message)
