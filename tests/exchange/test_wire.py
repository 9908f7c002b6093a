"""What crosses the wire arrives bit for bit, and nothing else gets in."""

import io
from dataclasses import replace

import numpy as np
import pytest
import safetensors.numpy
import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.adapters import AdapterState, LoraFactors
from fedlora.common.errors import WireError
from fedlora.exchange import Broadcast, ClientInfo, ClientUpdate, Plan, heads, wire
from tests.federation import METRICS, repack, tensors_of

BASE = "abc123"


def adapter(seed: int = 0, ranks=(4, 2), d_in: int = 6, d_out: int = 5, tensors: bool = True) -> AdapterState:
    g = torch.Generator().manual_seed(seed)
    lora = {
        f"layers.{i}.q_proj": LoraFactors(
            A=torch.randn(r, d_in, generator=g), B=torch.randn(d_out, r, generator=g), scaling=2.0 / r
        )
        for i, r in enumerate(ranks)
    }
    return AdapterState(lora=lora, tensors={"head.weight": torch.randn(2, 3, generator=g)} if tensors else {})


def same(left: AdapterState, right: AdapterState) -> bool:
    return (
        list(left.lora) == list(right.lora)
        and list(left.tensors) == list(right.tensors)
        and all(
            torch.equal(f.A, right.lora[n].A)
            and torch.equal(f.B, right.lora[n].B)
            and f.scaling == right.lora[n].scaling
            for n, f in left.lora.items()
        )
        and all(torch.equal(t, right.tensors[n]) for n, t in left.tensors.items())
    )


PLAN = Plan(
    train=frozenset("B"),
    send=frozenset("B"),
    keep=frozenset({"A", "mtllora_L"}),
    frozen=frozenset({"fedalt_C"}),
    modules=frozenset(["q"]),
    begun=2,
    span=4,
)


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 1000),
    ranks=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    d_in=st.integers(1, 9),
    folds=st.integers(0, 2),
)
def test_a_broadcast_arrives_bit_for_bit(seed, ranks, d_in, folds):
    sent = Broadcast(
        round=3,
        adapter=adapter(seed, ranks, d_in),
        base_version=5,
        folds=tuple(adapter(seed + i, ranks, d_in, tensors=False) for i in range(folds)),
        folds_from=2,
        plan=PLAN,
        probe=(0.5, -1.25),
    )
    got = wire.decode_broadcast(wire.encode_broadcast(sent, BASE), BASE)
    assert same(got.adapter, sent.adapter)
    assert all(same(g, s) for g, s in zip(got.folds, sent.folds, strict=True))
    assert (got.round, got.base_version, got.folds_from) == (3, 5, 2)
    assert got.plan == PLAN
    assert got.probe == (0.5, -1.25)


@pytest.mark.parametrize("probe", [[float("nan")], [1], "0.5"])
def test_a_probe_is_a_list_of_finite_numbers(probe):
    record = wire.encode_broadcast(Broadcast(round=1, adapter=adapter(0)), BASE)
    record["head"]["probe"] = probe
    with pytest.raises(WireError, match="the server sent probe"):
        wire.decode_broadcast(record, BASE)


def test_personal_parts_of_a_kind_are_not_sent_back():
    tensors = {"q.mtllora_L": torch.eye(2), "q.mtllora_A": torch.ones(2, 3), "mtllora_L.weight": torch.ones(1)}
    tensors["q.fedalt_C"] = torch.ones(1)
    plan = Plan(keep=frozenset({"B", "mtllora_L"}), frozen=frozenset({"fedalt_C"}))
    assert set(plan.sent_back(AdapterState(tensors=tensors)).tensors) == {"q.mtllora_A", "mtllora_L.weight"}
    assert plan.kept_factors == {"B"}


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_a_narrow_format_rounds_once_and_halves_the_bytes(dtype, torch_dtype):
    sent = Broadcast(round=1, adapter=adapter(ranks=(64, 64), d_in=64))
    record = wire.encode_broadcast(sent, BASE, dtype)
    got = wire.decode_broadcast(record, BASE)
    for name, factors in sent.adapter.lora.items():
        assert torch.equal(got.adapter.lora[name].A, factors.A.to(torch_dtype).float())
    assert wire.payload_bytes(record) < 0.55 * wire.payload_bytes(wire.encode_broadcast(sent, BASE))


def test_values_beyond_fp16_are_refused_by_the_sender():
    big = AdapterState(lora={"q": LoraFactors(A=torch.full((1, 2), 1e6), B=torch.ones(2, 1), scaling=1.0)})
    with pytest.raises(WireError, match=r"q\.A: values are not finite in fp16; set wire\.dtype"):
        wire.encode_broadcast(Broadcast(round=1, adapter=big), BASE, "fp16")
    assert wire.encode_broadcast(Broadcast(round=1, adapter=big), BASE, "bf16")


def update(**changes) -> ClientUpdate:
    fields = {
        "client_id": 7,
        "adapter": adapter(1),
        "num_examples": 10,
        "base_version": 2,
        "metrics": METRICS,
    }
    return ClientUpdate(**(fields | changes))


SENT = Broadcast(round=1, adapter=adapter(0), base_version=2)


def test_an_update_arrives_with_what_the_client_will_still_hold():
    reply = wire.decode_update(wire.encode_update(update(), BASE, known_base_version=2), 7, SENT, BASE)
    assert same(reply.update.adapter, update().adapter)
    assert reply.update.metrics == METRICS
    assert reply.known_base_version == 2


def test_only_uploaded_factors_travel():
    sent = Broadcast(round=1, adapter=adapter(0), base_version=2, plan=Plan(send=frozenset("B")))
    record = wire.encode_update(update(), BASE, send=sent.plan.send)
    with tensors_of(record) as arrays:
        assert not [name for name in arrays if name.endswith("|A")]
    got = wire.decode_update(record, 7, sent, BASE).update
    assert all(f.A.numel() == 0 and f.B.numel() > 0 for f in got.adapter.lora.values())


def nan_adapter() -> AdapterState:
    state = adapter(1)
    state.lora["layers.0.q_proj"].A[0, 0] = float("nan")
    return state


def rescaled(scaling: float) -> AdapterState:
    state = adapter(1)
    return AdapterState(lora={n: LoraFactors(f.A, f.B, scaling) for n, f in state.lora.items()}, tensors=state.tensors)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (update(client_id=8), "sent client id 8, expected 7"),
        (update(base_version=1), "sent base version 1, expected 2"),
        (update(adapter=adapter(1, ranks=(4, 4))), r"q_proj: client 7 sent (scaling|A shape|B shape)"),
        (update(adapter=adapter(1, ranks=(4,))), "sent other modules"),
        (update(adapter=adapter(1, tensors=False)), "sent other tensors"),
        (update(adapter=rescaled(3.0)), "sent scaling 3.0"),
        (update(num_examples=0), "num-examples 0, expected at least 1"),
        (update(metrics={"train-loss": float("inf")}), "metric 'train-loss' is inf"),
    ],
)
def test_the_server_refuses_what_it_did_not_ask_for(changed, says):
    with pytest.raises(WireError, match=says):
        wire.decode_update(wire.encode_update(changed, BASE), 7, SENT, BASE)


def test_a_client_that_diverged_does_not_send():
    with pytest.raises(WireError, match="not finite in fp32"):
        wire.encode_update(update(adapter=nan_adapter()), BASE)


def npy(array: np.ndarray, **keywords) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, **keywords)
    return stream.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"garbage",
        npy(np.array([{"a": 1}], dtype=object), allow_pickle=True),
        (2**63).to_bytes(8, "little") + b"{}",
        (200).to_bytes(8, "little") + b'{"layers.0.q_proj|A":{"dtype":"F32","shape":[9,9],"data_offsets":[0,324]}}',
    ],
)
def test_bytes_that_hold_no_tensors_are_refused(data):
    record = wire.encode_update(update(), BASE)
    repack(record, data)
    with pytest.raises(WireError, match="client 7: the tensors of 'adapter' are malformed"):
        wire.decode_update(record, 7, SENT, BASE)


@pytest.mark.parametrize(
    "values",
    [
        np.zeros((4, 6), dtype=np.float64),
        np.zeros((4, 6), dtype=np.float16),
        np.full((4, 6), np.nan, dtype=np.float32),
        np.zeros((6, 4), dtype=np.float32),
        np.zeros((1, 6), dtype=np.float32),
        np.zeros((1, 4, 6), dtype=np.float32),
    ],
)
def test_a_forged_array_is_refused(values):
    record = wire.encode_update(update(), BASE)
    with tensors_of(record) as arrays:
        arrays["layers.0.q_proj|A"] = values
    with pytest.raises(WireError, match=r"layers\.0\.q_proj"):
        wire.decode_update(record, 7, SENT, BASE)


def test_a_reply_of_another_round_is_refused():
    """A reply that is played again, from a round before on the same base."""
    record = wire.encode_update(update(), BASE, number=1)
    assert wire.decode_update(record, 7, SENT, BASE).update.client_id == 7
    with pytest.raises(WireError, match="client 7 sent round 1, expected 2"):
        wire.decode_update(record, 7, replace(SENT, round=2), BASE)


def test_all_tensors_of_an_adapter_are_one_array():
    """Flower moves each array by requests of its own, which cost more than their bytes."""
    record = wire.encode_broadcast(SENT, BASE)
    assert [len(arrays) for arrays in record.array_records.values()] == [1]


def test_a_header_cannot_ask_for_more_memory_than_was_sent():
    record = wire.encode_update(update(), BASE)
    header = b'{"layers.0.q_proj|A":{"dtype":"F32","shape":[9999999,99999],"data_offsets":[0,3999995600004]}}'
    repack(record, len(header).to_bytes(8, "little") + header + bytes(96))
    with pytest.raises(WireError, match="malformed"):
        wire.decode_update(record, 7, SENT, BASE)


def test_a_header_of_many_empty_tensors_is_refused_before_it_is_read(monkeypatch):
    """Each entry is several objects in Python, many times as large as its text."""
    record = wire.encode_update(update(), BASE)
    with tensors_of(record) as arrays:
        arrays |= {f"x{i}": np.zeros((0,), dtype=np.float32) for i in range(20_000)}
    monkeypatch.setattr(safetensors.numpy, "load", lambda data: pytest.fail("it was read"))
    with pytest.raises(
        WireError, match=r"client 7: the header of 'adapter' is 1\d{6} bytes, but 5 tensors need no more"
    ):
        wire.decode_update(record, 7, SENT, BASE)


def test_values_beyond_what_was_asked_for_are_refused_before_they_are_copied(monkeypatch):
    record = wire.encode_update(update(), BASE)
    with tensors_of(record) as arrays:
        arrays["layers.0.q_proj|A"] = np.zeros((4, 60_000), dtype=np.float32)
    monkeypatch.setattr(safetensors.numpy, "load", lambda data: pytest.fail("it was read"))
    with pytest.raises(WireError, match=r"client 7: the tensors of 'adapter' hold 96\d{4} bytes, expected at most \d+"):
        wire.decode_update(record, 7, SENT, BASE)


def test_other_bases_protocols_and_formats_are_refused_by_name():
    record = wire.encode_broadcast(SENT, BASE)
    with pytest.raises(WireError, match="the server has base model 'abc123', but this side 'def'"):
        wire.decode_broadcast(record, "def")
    record["head"]["protocol"] = 99
    with pytest.raises(WireError, match=f"uses protocol 99, but this side {heads.PROTOCOL}"):
        wire.decode_broadcast(record, BASE)
    record["head"]["protocol"] = heads.PROTOCOL
    record["head"]["dtype"] = "fp8"
    with pytest.raises(WireError, match="unknown number format 'fp8'"):
        wire.decode_broadcast(record, BASE)


@pytest.mark.parametrize(
    "record",
    [
        RecordDict(),
        RecordDict({"head": ConfigRecord({"protocol": heads.PROTOCOL, "base": BASE, "dtype": "fp32"})}),
        RecordDict({"adapter": ArrayRecord(), "metrics": MetricRecord()}),
    ],
)
def test_a_message_without_its_records_is_refused(record):
    with pytest.raises(WireError):
        wire.decode_update(record, 7, SENT, BASE)
    with pytest.raises(WireError):
        wire.decode_broadcast(record, BASE)


def test_who_a_client_is_arrives():
    info = ClientInfo(client_id=3, rank=8, alpha="2r", num_examples=40, rslora=True, rank_pattern={"k_proj": 2})
    assert wire.decode_info(wire.encode_info(info, BASE), BASE, "node 1") == info


def test_an_evaluation_arrives():
    names = frozenset({"loss", "accuracy"})
    record = wire.encode_evaluation(12, {"loss": 0.5, "accuracy": 1.0}, BASE, names)
    assert wire.decode_evaluation(record, BASE, "client 0", names) == (12, {"loss": 0.5, "accuracy": 1.0})
