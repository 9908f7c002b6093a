"""A reply that is not what was asked for is refused by name, and the round goes on without it."""

from __future__ import annotations

import copy
import functools
import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.adapters import AdapterState, LoraFactors
from fedlora.clients.client_app import app as client_app
from fedlora.clients.node import held_folds
from fedlora.common.errors import RunError, WireError
from fedlora.data import kept_back, most_kept_back
from fedlora.exchange import Broadcast, ClientInfo, ClientUpdate, Plan, codec, wire
from fedlora.results.run_folder import folder_of
from fedlora.simulations import run as simulation
from fedlora.simulations.engines import local
from fedlora.strategies.server import collect
from tests.federation import METRICS, packed, repack, tensors_of, tiny
from tests.simulations.engines.test_local import apart, saved_adapter

BASE, EXAMPLES = "abc123", 10
MODULES = ("layers.0.q_proj", "layers.1.q_proj")


def adapter(seed: int, cores: bool) -> AdapterState:
    g = torch.Generator().manual_seed(seed)
    lora = {
        name: LoraFactors(
            A=torch.randn(3, 6, generator=g),
            B=torch.randn(5, 3, generator=g),
            scaling=2.0,
            R=torch.randn(3, 3, generator=g) if cores else None,
        )
        for name in MODULES
    }
    return AdapterState(lora=lora, tensors={"head.weight": torch.randn(2, 3, generator=g)})


def asked(upload: str, task: str = "train") -> Broadcast:
    return Broadcast(
        round=3, adapter=adapter(0, upload == "R"), base_version=2, plan=Plan(send=frozenset(upload)), job=task
    )


def reply(dtype: str, upload: str) -> RecordDict:
    update = ClientUpdate(
        client_id=7, adapter=adapter(1, upload == "R"), num_examples=EXAMPLES, base_version=2, metrics=METRICS
    )
    return wire.encode_update(update, BASE, dtype, frozenset(upload), known_base_version=2, number=3)


def decode(record: RecordDict, upload: str) -> ClientUpdate:
    return wire.decode_update(record, 7, asked(upload), BASE, EXAMPLES).update


Mutation = Callable[[RecordDict, Any], None]


def head(key: str, values: st.SearchStrategy[Any]) -> Mutation:
    def change(record: RecordDict, data: Any) -> None:
        record["head"][key] = data.draw(values)

    return change


Arrays = dict[str, np.ndarray]


def in_arrays(change: Callable[[Arrays, str, Any], None]) -> Mutation:
    """A change to the tensors by name, of which one is drawn."""

    @functools.wraps(change)
    def mutation(record: RecordDict, data: Any) -> None:
        with tensors_of(record) as arrays:
            change(arrays, data.draw(st.sampled_from(sorted(arrays))), data)

    return mutation


@in_arrays
def renamed(arrays: Arrays, name: str, data: Any) -> None:
    arrays[data.draw(st.sampled_from(["x", "", "tensors|x", name + "|scale", name.upper()]))] = arrays.pop(name)


@in_arrays
def dropped(arrays: Arrays, name: str, data: Any) -> None:
    del arrays[name]


@in_arrays
def added(arrays: Arrays, name: str, data: Any) -> None:
    arrays[data.draw(st.sampled_from(["layers.2.q_proj|A", "tensors|more", "junk"]))] = arrays[name]


@in_arrays
def reshaped(arrays: Arrays, name: str, data: Any) -> None:
    values = arrays[name]
    shapes = [values.shape[::-1], (values.size,), (1, *values.shape), (*values.shape, 1), (), (0, *values.shape[1:])]
    shape = data.draw(st.sampled_from([s for s in shapes if s != values.shape]))
    arrays[name] = np.resize(values, shape)


@in_arrays
def oversized(arrays: Arrays, name: str, data: Any) -> None:
    values = arrays[name]
    arrays[name] = np.resize(values, (values.shape[0] + 100, *values.shape[1:]))


@in_arrays
def retyped(arrays: Arrays, name: str, data: Any) -> None:
    kinds = ["float64", "float16", "int32", "uint8", "int8", "float32", "int64", "bool"]
    kind = np.dtype(data.draw(st.sampled_from([k for k in kinds if np.dtype(k) != arrays[name].dtype])))
    with np.errstate(all="ignore"):
        arrays[name] = arrays[name].astype(kind)


def not_finite(record: RecordDict, data: Any) -> None:
    """NaN or inf in floats, bf16's too, and in the scales of codes."""
    dtype = str(record.config_records["head"]["dtype"])
    with tensors_of(record) as arrays:
        name = data.draw(
            st.sampled_from(
                [
                    n
                    for n, array in sorted(arrays.items())
                    if array.size and (dtype == "bf16" or array.dtype.kind == "f")
                ]
            )
        )
        place = data.draw(st.integers(0, arrays[name].size - 1))
        bad = data.draw(st.sampled_from([float("nan"), float("inf"), float("-inf")]))
        value = torch.tensor(bad).bfloat16().view(torch.int16).item() if dtype == "bf16" else bad
        arrays[name].flat[place] = value


def declared(record: RecordDict, data: Any) -> None:
    """A header that says more, or less, than there are bytes."""
    whole = packed(record)
    end = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:end])
    name = data.draw(st.sampled_from(sorted(header)))
    shapes = [[10**9, 10**9], [1, 1], [2**62], [], [2**64 - 1]]
    change = data.draw(st.sampled_from([{"shape": shape} for shape in shapes] + [{"data_offsets": [0, 2**62]}]))
    header[name] |= change
    text = json.dumps(header).encode()
    repack(record, len(text).to_bytes(8, "little") + text + whole[end:])


def truncated(record: RecordDict, data: Any) -> None:
    whole = packed(record)
    repack(record, whole[: data.draw(st.integers(0, len(whole) - 1))])


def other_modules(record: RecordDict, data: Any) -> None:
    """The head and the arrays agree with each other, and not with what was sent."""
    what = data.draw(st.sampled_from(["missing", "extra", "another"]))
    with tensors_of(record) as arrays:
        mine = [name for name in arrays if name.startswith(f"{MODULES[1]}|")]
        if what != "missing":
            for name in mine:
                arrays[name.replace("layers.1", "layers.9")] = arrays[name]
        if what != "extra":
            for name in mine:
                del arrays[name]
    modules = {
        "missing": [MODULES[0]],
        "extra": [*MODULES, "layers.9.q_proj"],
        "another": [MODULES[0], "layers.9.q_proj"],
    }
    record["head"]["adapter.modules"] = modules[what]
    record["head"]["adapter.scalings"] = [2.0] * len(modules[what])


def key_dropped(record: RecordDict, data: Any) -> None:
    del record["head"][data.draw(st.sampled_from(sorted(record["head"])))]


def record_dropped(record: RecordDict, data: Any) -> None:
    del record[data.draw(st.sampled_from(sorted(record)))]


def record_added(record: RecordDict, data: Any) -> None:
    record[data.draw(st.sampled_from(["fold-0", "junk"]))] = data.draw(
        st.sampled_from([ArrayRecord(), MetricRecord(), ConfigRecord()])
    )


def metric(record: RecordDict, data: Any) -> None:
    name = data.draw(st.sampled_from(["train-loss", "secret", ""]))
    values = [float("nan"), float("inf"), 1e308, [1.0], [], 10**400] if name == "train-loss" else [1.0]
    record["metrics"][name] = data.draw(st.sampled_from(values))


OTHERS = st.one_of(st.just(""), st.just(b""), st.just(1.5), st.just([1]), st.just(["x"]), st.booleans())
REFUSED: dict[str, Mutation] = {
    "examples": head("num-examples", OTHERS | st.sampled_from([0, -1, EXAMPLES + 1, 10**18, 10**5000])),
    "client": head("client-id", OTHERS | st.sampled_from([6, 8, -7])),
    "base version": head("base-version", OTHERS | st.sampled_from([1, 3, -2, 10**30])),
    "known version": head("known-base-version", OTHERS | st.sampled_from([1, 3, 10**30])),
    "job": head("job", OTHERS | st.sampled_from(["gradient", "evaluate"])),
    "number format": head("dtype", OTHERS | st.sampled_from(["fp8", "fp16"])),
    "base": head("base", OTHERS),
    "more modules in the head": head("adapter.modules", st.sampled_from([["x"] * 9999, [*MODULES, "x"], [], [1, 2]])),
    "a module twice": head("adapter.modules", st.just([MODULES[0], MODULES[0]])),
    "more scalings": head("adapter.scalings", st.sampled_from([[2.0] * 3, [], [2, 2], ["2", "2"]])),
    "scalings": head("adapter.scalings", st.sampled_from([[2.0, x] for x in (0.0, -2.0, float("nan"), 3.0)])),
    "dense names": head("adapter.tensors", st.sampled_from([[], ["head.weight"] * 2, ["x"], [1]])),
    "unknown key": head("more", OTHERS),
    "not finite": not_finite,
} | {
    mutation.__name__: mutation
    for mutation in (
        *(renamed, dropped, added, reshaped, oversized, retyped, declared, truncated),
        *(other_modules, key_dropped, record_dropped, record_added, metric),
    )
}


@pytest.mark.parametrize("upload", ["AB", "B", "R"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8", "int4", "sparse"])
@settings(deadline=None, max_examples=60)
@given(data=st.data(), name=st.sampled_from(sorted(REFUSED)))
def test_every_broken_reply_is_refused_by_the_clients_name(dtype, upload, name, data):
    record = copy.deepcopy(reply(dtype, upload))
    REFUSED[name](record, data)
    with pytest.raises(WireError, match="client 7") as caught:
        decode(record, upload)
    assert len(str(caught.value)) < 1000
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_every_kind_of_broken_reply_is_refused(name):
    @settings(deadline=None, max_examples=12)
    @given(data=st.data(), dtype=st.sampled_from(["fp32", "int4", "sparse"]))
    def check(data, dtype):
        record = copy.deepcopy(reply(dtype, "AB"))
        REFUSED[name](record, data)
        with pytest.raises(WireError, match="client 7"):
            decode(record, "AB")

    check()


@pytest.mark.parametrize("upload", ["AB", "B", "R"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8", "int4", "sparse"])
@settings(deadline=None, max_examples=10)
@given(data=st.data())
def test_what_is_only_said_in_another_order_means_the_same(dtype, upload, data):
    record = reply(dtype, upload)
    good = decode(record, upload)
    with tensors_of(record) as arrays:
        for name in data.draw(st.permutations(sorted(arrays))):
            arrays[name] = arrays.pop(name)
    mixed = RecordDict(
        {
            "metrics": record["metrics"],
            "adapter": record["adapter"],
            "head": ConfigRecord(dict(data.draw(st.permutations(list(record["head"].items()))))),
        }
    )
    mixed["head"]["adapter.modules"] = list(MODULES[::-1])
    mixed["head"]["adapter.tensors"] = list(good.adapter.tensors)[::-1]
    got = decode(mixed, upload)
    assert list(got.adapter.lora) == list(good.adapter.lora)
    assert (got.num_examples, got.metrics) == (good.num_examples, good.metrics)
    for name, factors in good.adapter.lora.items():
        assert torch.equal(got.adapter.lora[name].A, factors.A)
        assert torch.equal(got.adapter.lora[name].B, factors.B)
    assert all(torch.equal(got.adapter.tensors[name], tensor) for name, tensor in good.adapter.tensors.items())


@pytest.mark.parametrize(("dtype", "size"), [("int8", 3e38), ("int4", 3e38), ("bf16", 3.3e38)])
def test_finite_codes_that_make_no_finite_values_are_refused(dtype, size):
    """Scales times codes, or the change on top of what was sent, leave fp32's range."""
    sent = Broadcast(round=1, adapter=AdapterState(tensors={"w": torch.full((1, 2), 3e38)}))
    record = wire.encode_update(
        ClientUpdate(
            client_id=7, adapter=AdapterState(tensors={"w": torch.ones(1, 2)}), num_examples=1, metrics=METRICS
        ),
        BASE,
        dtype,
    )
    with tensors_of(record) as arrays:
        if dtype in codec.LARGEST:
            arrays["tensors|w|scale"] = np.array([size], dtype=np.float32)
        else:
            arrays["tensors|w"] = torch.full((1, 2), size).bfloat16().view(torch.int16).numpy()
    with pytest.raises(WireError, match=r"client 7: .*w"):
        wire.decode_update(record, 7, sent, BASE)


def info(**fields: Any) -> RecordDict:
    known = {"client_id": 3, "rank": 8, "alpha": "2r", "num_examples": 40, "rank_pattern": {"k_proj": 2}}
    return wire.encode_info(ClientInfo(**(known | fields)), BASE)


@pytest.mark.parametrize(
    "fields",
    [
        {"rank": 0},
        {"rank": 10**9},
        {"num_examples": 0},
        {"num_examples": 10**18},
        {"client_id": -1},
        {"alpha": "nan"},
        {"alpha": "1e999"},
        {"alpha": "-2r"},
        {"alpha": "x" * 10**5},
        {"rank_pattern": {"k_proj": 10**9}},
    ],
)
def test_a_client_that_nobody_can_be_is_refused(fields):
    """Ranks above all: the server allocates by them."""
    with pytest.raises(WireError, match="node 5"):
        wire.decode_info(info(**fields), BASE, "node 5")


SCORES = frozenset({"loss", "accuracy"})


def test_no_metric_but_the_known_ones_is_sent_or_taken():
    with pytest.raises(WireError, match="metric 'longest-row' cannot be sent"):
        wire.encode_evaluation(3, {"longest-row": 1.0}, BASE, SCORES)
    update = ClientUpdate(client_id=7, adapter=adapter(1, False), num_examples=1, metrics={"first-token": 5.0})
    with pytest.raises(WireError, match="metric 'first-token' cannot be sent"):
        wire.encode_update(update, BASE)
    record = wire.encode_evaluation(3, {"loss": 1.0}, BASE, SCORES)
    record["metrics"]["longest-row"] = 1.0
    with pytest.raises(WireError, match="client 4 sent metric 'longest-row', expected only accuracy, loss"):
        wire.decode_evaluation(record, BASE, "client 4", SCORES)


def test_a_mean_is_over_those_who_sent_the_metric():
    answers = {0: {"num-examples": 1, "loss": 1.0}, 1: {"num-examples": 3, "loss": 2.0}, 2: {"num-examples": 9}}
    assert collect.weighted_mean(answers, "loss") == pytest.approx(1.75)
    assert collect.weighted_mean(answers, "accuracy") is None
    huge = {i: {"num-examples": 10**9, "loss": 1e305} for i in range(3)}
    assert collect.weighted_mean(huge, "loss") == pytest.approx(1e305)


# whole rounds


def one_bad(change: Callable[[RecordDict], None], kind: str = "train") -> ClientApp:
    """The product's client, but client 2 spoils its replies."""
    app = ClientApp()

    def answer(message: Message, context: Context) -> Message:
        answered = client_app(message, context)
        if context.node_config["partition-id"] == 2 and message.metadata.message_type == kind:
            change(answered.content)
        return answered

    for name in (app.query, app.train, app.evaluate):
        name()(answer)
    return app


def a_nan(record: RecordDict) -> None:
    with tensors_of(record) as arrays:
        next(values for name, values in arrays.items() if name.endswith("|A"))[0, 0] = np.nan


def set_head(**keys: Any) -> Callable[[RecordDict], None]:
    def change(record: RecordDict) -> None:
        for key, value in keys.items():
            record["head"][key.replace("_", "-")] = value

    return change


def a_module_less(record: RecordDict) -> None:
    gone = record["head"]["adapter.modules"].pop()
    record["head"]["adapter.scalings"].pop()
    with tensors_of(record) as arrays:
        for part in "AB":
            del arrays[f"{gone}|{part}"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (a_nan, r"client 2: .*(q|v|down)_proj\|A holds values that are not finite"),
        (a_module_less, "client 2 sent other modules than it was sent: 5 instead of 6"),
        (set_head(num_examples=10**6), "client 2 sent num-examples 1000000"),
    ],
)
def test_the_round_is_what_it_is_without_that_client(tmp_path, tiny_llama, fresh_process, change, says):
    config = tiny(tmp_path, tiny_llama, federation__rounds=1)
    simulation.in_process(config, client_app=one_bad(change))
    [entry] = json.loads((folder_of(config) / "result.json").read_text())["rounds"]
    assert list(entry["failures"]) == ["2"]
    assert set(entry["clients"]) == {"0", "1", "3"}
    assert re.search(says, entry["failures"]["2"])

    held_folds._held.clear()
    other = tiny(tmp_path, tiny_llama, federation__rounds=1, run__id="two")
    with pytest.MonkeyPatch.context() as patch:  # the same round, from which that client is left out
        from fedlora.strategies.schedules import session

        chosen = session.Session._chosen
        patch.setattr(session.Session, "_chosen", lambda *args: [c for c in chosen(*args) if c != 2])
        simulation.in_process(other)
    assert apart(saved_adapter(folder_of(config)), saved_adapter(folder_of(other))) == 0.0


def test_a_reply_that_is_played_again_in_a_later_round_is_refused(tmp_path, tiny_llama, fresh_process):
    """With fedavg the base never changes, so that nothing but the round tells the two apart."""
    first: list[RecordDict] = []

    def replay(record: RecordDict) -> None:
        if first:
            record.clear()
            record.update(first[0])
        else:
            first.append(copy.deepcopy(record))

    config = tiny(tmp_path, tiny_llama, strategy__name="fedavg", lora__ranks="", lora__rank=2)
    simulation.in_process(config, client_app=one_bad(replay))
    one, two = json.loads((folder_of(config) / "result.json").read_text())["rounds"]
    assert one["failures"] == {}
    assert two["failures"] == {"2": "client 2 sent round 1, expected 2"}


class Echo(local.LocalGrid):
    """Every reply comes twice, as do those of the message before."""

    def pull_messages(self, message_ids):
        replies = list(super().pull_messages(message_ids))
        self.seen = [*getattr(self, "seen", []), *replies]
        return [*replies, *self.seen[-2:]]


def test_a_reply_that_comes_twice_counts_once(tmp_path, tiny_llama, fresh_process, monkeypatch):
    config = tiny(tmp_path, tiny_llama)
    simulation.in_process(config)
    held_folds._held.clear()
    other = tiny(tmp_path, tiny_llama, run__id="two")
    monkeypatch.setattr(local, "LocalGrid", Echo)
    simulation.in_process(other)
    assert apart(saved_adapter(folder_of(config)), saved_adapter(folder_of(other))) == 0.0
    one, two = (json.loads((folder_of(c) / "result.json").read_text())["rounds"] for c in (config, other))
    assert [e["upload-bytes"] for e in one] == [e["upload-bytes"] for e in two]


def test_bad_evaluations_are_left_out_of_the_means(tmp_path, tiny_llama, fresh_process):
    config = tiny(tmp_path, tiny_llama, federation__rounds=1, evaluate__clients=True, data__client_test_fraction=0.3)

    def spoil(record: RecordDict) -> None:
        record["metrics"]["loss"] = float("nan")

    simulation.in_process(config, client_app=one_bad(spoil, "evaluate"))
    [entry] = json.loads((folder_of(config) / "result.json").read_text())["rounds"]
    assert set(entry["client-test"]["clients"]) == {"0", "1", "3"}
    assert "client 2: metric 'loss' is nan" in entry["client-test"]["failures"]["2"]
    assert np.isfinite(entry["client-test"]["mean"]["loss"])


def test_an_evaluation_counts_for_no_more_rows_than_the_client_can_have(tmp_path, tiny_llama, fresh_process):
    """Its number of training rows is known from the start, and the run says which share of its rows it tests on."""
    keys = {"evaluate__clients": True, "data__client_test_fraction": 0.3, "federation__max_share": 0.0}
    config = tiny(tmp_path, tiny_llama, federation__rounds=1, **keys)
    simulation.in_process(config)
    [entry] = json.loads((folder_of(config) / "result.json").read_text())["rounds"]
    assert set(entry["client-test"]["clients"]) == set("0123")
    honest = entry["client-test"]["clients"]["2"]["num-examples"]
    other = tiny(tmp_path, tiny_llama, federation__rounds=1, run__id="two", **keys)
    simulation.in_process(other, client_app=one_bad(set_head(**{"num-examples": 1000}), "evaluate"))
    [entry] = json.loads((folder_of(other) / "result.json").read_text())["rounds"]
    assert set(entry["client-test"]["clients"]) == set("013")
    assert (
        f"client 2 sent num-examples 1000, expected an integer from 0 to {honest}"
        in (entry["client-test"]["failures"]["2"])
    )


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.1, 0.3, 0.5, 0.9])
def test_the_most_test_rows_are_those_that_a_client_could_have(fraction):
    for rows in range(1, 200):
        kept = kept_back(rows, fraction)
        bound = most_kept_back(rows - kept, fraction)
        possible = [kept_back(n, fraction) for n in range(1, 5000) if n - kept_back(n, fraction) == rows - kept]
        assert kept <= bound == max(possible)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (set_head(rank=10**9), "sent rank 1000000000"),
        (set_head(**{"rank-pattern": ["(a+)+$"], "rank-pattern-ranks": [2]}), "has another lora.rank-pattern"),
        (set_head(alpha="1e300"), "has another lora.alpha than this run"),
        (set_head(rslora=True), "has another lora.rslora than this run"),
    ],
)
def test_a_node_that_says_what_it_cannot_be_takes_no_part(tmp_path, tiny_llama, fresh_process, change, says):
    config = tiny(tmp_path, tiny_llama, federation__rounds=1)
    simulation.in_process(config, client_app=one_bad(change, "query"))
    result = json.loads((folder_of(config) / "result.json").read_text())
    assert [client["client-id"] for client in result["clients"]] == [0, 1, 3]
    with pytest.raises(RunError, match=f"3 of 4 clients can take part.*{says}"):
        simulation.in_process(
            tiny(tmp_path, tiny_llama, federation__min_clients=4, run__id="two"), client_app=one_bad(change, "query")
        )
