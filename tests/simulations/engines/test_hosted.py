"""One node that hosts several clients: the same federation as with a node for each, in fewer messages."""

import json
import logging
import random
import re
from collections.abc import Iterable

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict

from fedlora.adapters import AdapterState, LoraFactors
from fedlora.clients.answering import single, together
from fedlora.clients.client_app import app as client_app
from fedlora.clients.node import held_folds, rules
from fedlora.common.errors import ConfigError, WireError
from fedlora.common.events import listen
from fedlora.common.once import say_once
from fedlora.config import Config
from fedlora.deployment import envelope
from fedlora.exchange import Broadcast, ClientUpdate, parts, wire
from fedlora.models import base_fingerprint
from fedlora.results.run_folder import folder_of
from fedlora.simulations.engines import local
from fedlora.strategies.initializers import uniform
from fedlora.strategies.server_app import app as server_app
from tests.device import assert_same, run_bound
from tests.federation import METRICS, tiny, write_rows
from tests.simulations.engines.test_cohorts import apart
from tests.simulations.engines.test_local import saved_adapter

CLIENTS = 8
TWO = ["0-3", "4-7"]


@pytest.fixture(autouse=True)
def _fresh_process(fresh_process):
    say_once.cache_clear()


def eight(folder, model, **keys) -> Config:
    folder.mkdir(parents=True, exist_ok=True)
    more = {
        "federation__clients": CLIENTS,
        "evaluate__server": False,
        "lora__ranks": "4,2,2,1,4,2,2,1",
        "data__source": str(write_rows(folder / "eight.jsonl", people=CLIENTS, rows=8)),
    }
    return tiny(folder, model, **{**more, **keys})


class Counting(local.LocalGrid):
    """Keeps what nodes were asked: (kind, round, node) -> the clients of each message; () for a plain one."""

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        for message in messages:
            about = message.metadata
            ids = tuple(parts.split(message.content, "x")) if parts.is_joined(message.content) else ()
            asked = self.__dict__.setdefault("asked", {})
            asked.setdefault((about.message_type, about.group_id, about.dst_node_id), []).append(ids)
        return super().push_messages(messages)


def nodes_of(folder, hosting: list[str] | None, **more) -> list[dict]:
    """A node for each client, or nodes that host these."""
    base = {"state": str(folder / "clients"), "resident": True, **more}
    if hosting is None:
        return [{**base, "partition-id": i} for i in range(CLIENTS)]
    return [{**base, "partition-ids": ids} for ids in hosting]


def played(config: Config, nodes: list[dict], kind: type[local.LocalGrid] = Counting):
    """`(adapter, result, grid)` of a run on these nodes."""
    held_folds._held.clear()
    flat = config.to_flat()
    grid = kind(client_app, nodes, flat, 9)
    server_app(grid, Context(9, 1, {}, RecordDict(), flat))
    result = json.loads((folder_of(config) / "result.json").read_text())
    return saved_adapter(folder_of(config)), result, grid


FEDSA = {"strategy__name": "fedsa", "lora__ranks": "2", "evaluate__clients": True, "data__client_test_fraction": 0.3}


@pytest.mark.parametrize(
    ("keys", "at_once"),
    [
        ({"strategy__name": "flora"}, "3"),
        (FEDSA, "1"),
        (FEDSA, "auto"),
        ({"strategy__name": "lora-fair", "wire__upload_dtype": "int8", "federation__fraction": 0.5}, "1"),
    ],
)
def test_two_nodes_with_four_clients_each_learn_what_eight_nodes_learn(tmp_path, tiny_llama, keys, at_once, sizes):
    alone = eight(tmp_path / "alone", tiny_llama, **keys)
    hosted = eight(tmp_path / "hosted", tiny_llama, train__clients_at_once=at_once, **keys)
    one, first, _ = played(alone, nodes_of(tmp_path / "alone", None))
    events = []
    with listen(lambda kind, facts: events.append((kind, facts))):
        two, second, grid = played(hosted, nodes_of(tmp_path / "hosted", TWO))
    if at_once == "1":
        assert sizes == []
        assert_same(two, one)
    else:
        assert max(sizes) == (3 if at_once == "3" else 4)
        assert apart(one, two) < run_bound(1e-4)
    for left, right in zip(first["rounds"], second["rounds"], strict=True):
        assert left["clients"].keys() == right["clients"].keys()
        assert right["failures"] == {}
        assert (left["download-bytes"], left["upload-bytes"]) == (right["download-bytes"], right["upload-bytes"])
        if "client-test" in left:
            means = [entry["client-test"]["mean"]["loss"] for entry in (left, right)]
            assert means[0] == pytest.approx(means[1], rel=1e-4)
    # one message for each node, of those of its clients that take part
    assert {len(asked) for asked in grid.asked.values()} == {1}
    done = {(facts["round"], facts["node"], facts["client_id"]) for kind, facts in events if kind == "client-done"}
    sent = {
        (int(number), rules, client)
        for (kind, number, rules), [ids] in grid.asked.items()
        for client in ids
        if kind == "train"
    }
    assert done == sent
    assert all((client < 4) == (rules == 2) for _, rules, client in sent)


def test_a_node_that_hosts_one_client_says_what_it_always_said(tmp_path, tiny_llama):
    def asked(settings):
        [name] = settings
        config = eight(tmp_path / name, tiny_llama, federation__clients=1, lora__ranks="4", data__heldout_fraction=0.3)
        _, _, grid = played(config, [{"state": str(tmp_path / name), **settings}])
        hello = Message(wire.encode_hello(base_fingerprint(config.model)), 2, "query", group_id="0")
        [reply] = grid.send_and_receive([hello])
        return reply.content, grid.asked

    content, messages = asked({"partition-id": 0})
    assert (content, messages) == asked({"partition-ids": "0"})
    assert {ids for sent in messages.values() for ids in sent} == {()}


class Forgetful(Counting):
    """Before each message of a later round the clients lose their folds, as a node that was started again."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        waiting = [self._waiting[known] for known in message_ids if known in self._waiting]
        if waiting and waiting[0].metadata.group_id == "4" and not self.__dict__.get("forgot"):
            held_folds._held.clear()
            self.__dict__["forgot"] = True
        return super().pull_messages(message_ids)


def test_clients_that_are_behind_are_asked_again_alone(tmp_path, tiny_llama):
    keys = {"strategy__name": "flora", "federation__rounds": 4, "federation__fraction": 0.5}
    keys |= {"run__seed": 5, "train__clients_at_once": "1", "lora__ranks": "1"}  # folds are not compacted
    one, _, _ = played(eight(tmp_path / "a", tiny_llama, **keys), nodes_of(tmp_path / "a", None))
    two, result, grid = played(
        eight(tmp_path / "b", tiny_llama, **keys), nodes_of(tmp_path / "b", ["0-7"]), kind=Forgetful
    )
    everyone, behind = grid.asked["train", "4", 2]
    assert (everyone, behind) == ((1, 3, 6, 7), (1, 3, 7))  # 6 is new to the run: it got all folds at once
    assert result["rounds"][-1]["failures"] == {}
    assert_same(two, one)


def test_a_hosted_client_that_is_refused_fails_alone(tmp_path, tiny_llama, monkeypatch, sizes):
    config = eight(tmp_path, tiny_llama, federation__rounds=1, train__clients_at_once="4", evaluate__clients=True)
    begin, evaluate = single.begin, single._TASKS["evaluate"]

    def picky(content, context):
        if context.node_config["partition-id"] == 2:
            raise ConfigError("client 2 would rather not")
        return begin(content, context)

    def broken(content, context):
        if context.node_config["partition-id"] == 5:
            raise ValueError("oh no")
        return evaluate(content, context)

    monkeypatch.setattr(single, "begin", picky)
    monkeypatch.setitem(single._TASKS, "evaluate", broken)
    _, result, _ = played(config, nodes_of(tmp_path, TWO))
    [entry] = result["rounds"]
    assert entry["failures"] == {"2": "client 2 refused: client 2 would rather not"}
    assert set(entry["clients"]) == set("0134567")
    assert sizes == [3, 4]
    assert entry["client-test"]["failures"] == {"5": "client 5 failed: ValueError: oh no"}
    assert set(entry["client-test"]["clients"]) == set("0123467")


def test_a_hosted_client_that_does_not_exist_is_refused_by_name_at_the_start(tmp_path, tiny_llama):
    config = eight(tmp_path, tiny_llama, federation__rounds=1, federation__wait_timeout=0.0)
    events = []
    with listen(lambda kind, facts: events.append((kind, facts))):
        _, result, _ = played(config, nodes_of(tmp_path, ["0-3", "4-6,9"]))
    [refused] = [facts for kind, facts in events if kind == "client-failed"]
    assert (refused["client_id"], refused["node"], refused["round"]) == (9, 3, 0)
    assert refused["reason"].startswith("client 9 on node 3 refused: ")
    assert set(result["rounds"][0]["clients"]) == set("0123456")


def test_of_two_nodes_that_host_the_same_client_the_first_keeps_it(tmp_path, tiny_llama, caplog):
    _, result, _ = played(eight(tmp_path, tiny_llama, federation__rounds=1), nodes_of(tmp_path, ["0-3", "3-7"]))
    assert "node 3 says that it is client 3, and is refused: node 2 is that client already" in caplog.text
    assert set(result["rounds"][0]["clients"]) == set("01234567")


class Late(Counting):
    """The second node connects once the first has been looked at a few times."""

    def get_node_ids(self) -> Iterable[int]:
        self.__dict__["looks"] = looks = self.__dict__.get("looks", 0) + 1
        return [2] if looks < 4 else [2, 3]


def test_the_server_waits_for_clients_and_not_for_nodes(tmp_path, tiny_llama, caplog):
    config = eight(tmp_path, tiny_llama, federation__rounds=1, federation__wait_timeout=60.0)
    with caplog.at_level(logging.INFO, "fedlora"):
        _, result, grid = played(config, nodes_of(tmp_path, TWO), kind=Late)
    assert len(result["rounds"][0]["clients"]) == CLIENTS
    assert [key for key in grid.asked if key[0] == "query"] == [("query", "0", 2), ("query", "0", 3)]
    assert caplog.text.count("waiting up to 60 s for 8 clients") == 1


class Spoiling(Counting):
    """The second node's answers to training messages are replaced by `spoil(content)`."""

    @staticmethod
    def spoil(content: RecordDict) -> RecordDict:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = list(super().pull_messages(message_ids))
        for reply in replies:
            if reply.metadata.message_type == "train" and reply.metadata.src_node_id == 3:
                reply.content = self.spoil(reply.content)
        return replies


def without_one(content: RecordDict) -> RecordDict:
    return RecordDict({name: record for name, record in content.items() if not name.startswith("5/")})


def swapped(content: RecordDict) -> RecordDict:
    """Clients 5 and 6 in each other's place."""
    other = {"5": "6", "6": "5"}
    return RecordDict({f"{other.get(name[0], name[0])}{name[1:]}": record for name, record in content.items()})


@pytest.mark.parametrize(
    ("spoil", "failed", "says"),
    [
        (without_one, "4567", "node 3 answered for clients [4, 6, 7], not for [4, 5, 6, 7]"),
        (lambda content: RecordDict({**content, "head": ConfigRecord({})}), "4567", "node 3 sent the record 'head'"),
        (lambda content: RecordDict(), "4567", "node 3 sent a message without records"),
        (lambda content: parts.split(content, "x")[4], "4567", "expected a client's id before it, such as '0/head'"),
        (swapped, "56", "sent client id"),
        (
            lambda content: RecordDict({**without_one(content), "5/error": ConfigRecord({"code": 1, "reason": "no"})}),
            "5",
            "client 5 failed: no",
        ),
    ],
)
def test_a_malformed_answer_fails_those_that_it_is_for(tmp_path, tiny_llama, monkeypatch, spoil, failed, says):
    monkeypatch.setattr(Spoiling, "spoil", staticmethod(spoil))
    config = eight(tmp_path, tiny_llama, federation__rounds=1)
    _, result, _ = played(config, nodes_of(tmp_path, TWO), kind=Spoiling)
    [entry] = result["rounds"]
    assert set(entry["failures"]) == set(failed)
    assert all(says in reason for reason in entry["failures"].values())
    assert set(entry["clients"]) == set("01234567") - set(failed)


def test_a_node_that_fails_fails_all_its_clients(tmp_path, tiny_llama, monkeypatch):
    def crash(*_):
        raise RuntimeError("the node is on fire")

    monkeypatch.setattr(together, "how_many", crash)
    config = eight(tmp_path, tiny_llama, federation__rounds=1)
    nodes = [*nodes_of(tmp_path, ["0-3"]), *nodes_of(tmp_path, None)[4:]]
    _, result, _ = played(config, nodes)
    [entry] = result["rounds"]
    assert {*entry["failures"]} == {*"0123"}
    assert entry["failures"]["1"] == "client 1 failed: RuntimeError: the node is on fire"
    assert {*entry["clients"]} == {*"4567"}


# what a node is asked


def ask(config: Config, settings: dict, content: RecordDict, kind: str = "train") -> Message:
    grid = local.LocalGrid(client_app, [settings], config.to_flat(), 7)
    [answer] = grid.send_and_receive([Message(content, 2, kind, group_id="1")])
    return answer


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda sent: {**sent, 9: sent[0]}, "the server asks for client 9, but this node hosts 0, 1"),
        (lambda sent: {**sent, 1: Error(1, "no")}, "the server sent an error in place of client 1's message"),
    ],
)
def test_a_message_that_is_not_for_this_node_is_refused(tmp_path, tiny_llama, spoil, says):
    config = eight(tmp_path, tiny_llama)
    plain = wire.encode_hello(base_fingerprint(config.model))
    answer = ask(config, {"partition-ids": "0,1"}, parts.join(spoil({0: plain, 1: plain})))
    assert answer.error.code == wire.REFUSED
    assert says in answer.error.reason
    answer = ask(config, {"partition-ids": "0,1"}, plain)
    assert "the server sent the record 'head', expected a client's id before it" in answer.error.reason


def test_each_hosted_client_has_its_own_rank_and_folder(tmp_path, tiny_llama):
    config = eight(tmp_path, tiny_llama, strategy__name="fedsa", lora__ranks="2", evaluate__clients=True)
    played(config, nodes_of(tmp_path, TWO))
    assert {path.parent.name for path in (tmp_path / "clients").rglob("personal-*")} == {
        f"client-{i}" for i in range(CLIENTS)
    }
    unequal = eight(tmp_path, tiny_llama)
    fingerprint = base_fingerprint(unequal.model)
    answer = ask(unequal, {"partition-ids": "0-3"}, wire.encode_hello(fingerprint), "query")
    infos = [wire.decode_info(part, fingerprint, "x") for part in parts.split(answer.content, "x").values()]
    assert [(info.client_id, info.rank) for info in infos] == [(0, 4), (1, 2), (2, 2), (3, 1)]
    broadcast = Broadcast(round=1, adapter=uniform.seeded(unequal, infos))  # at rank 4
    sent = wire.encode_broadcast(broadcast, fingerprint)
    answered = parts.split(
        ask(unequal, {"partition-ids": "0-3"}, parts.join(dict.fromkeys(range(4), sent))).content, ""
    )
    assert isinstance(answered.pop(0), RecordDict)
    assert all(
        re.search(r"the server sent factors of .* numbers, client .* has rank 4, expected", part.reason)
        for part in answered.values()
    )


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"partition-ids": "3-0"}, r"partition-ids = '3-0', expected numbers of clients, .* such as '0-3' or '0,2,5'"),
        ({"partition-ids": ""}, "expected numbers of clients"),
        ({"partition-ids": "0,,1"}, "expected numbers of clients"),
        ({"partition-ids": "-1"}, "expected numbers of clients"),
        ({"partition-ids": "0-1-2"}, "expected numbers of clients"),
        ({"partition-ids": "all"}, "expected numbers of clients"),
        ({"partition-ids": "١"}, "expected numbers of clients"),
        ({"partition-ids": True}, "expected numbers of clients"),
        ({"partition-ids": 1.5}, "expected numbers of clients"),
        ({"partition-ids": "0-999999999"}, "at most 4096"),
        ({"partition-ids": "0-4000,5000-6000"}, "at most 4096"),
        ({"partition-ids": "0-3,2"}, "names a client twice"),
        ({"partition-ids": "0-3", "partition-id": 0}, "both say which clients are here; keep one"),
        (
            {"partition-ids": "0-3", "data": "x.jsonl"},
            "data names the rows of one client, but .* are 4 clients; start a node",
        ),
        ({"partition_ids": "0-3"}, "did you mean 'partition-ids'"),
    ],
)
def test_wrong_ids_are_refused_in_one_sentence(settings, says, tmp_path, tiny_llama):
    config = eight(tmp_path, tiny_llama)
    answer = ask(config, settings, wire.encode_hello(base_fingerprint(config.model)), "query")
    assert answer.error.code == wire.REFUSED
    assert re.search(says, answer.error.reason)


@pytest.mark.parametrize(
    ("value", "ids"),
    [("0-3", (0, 1, 2, 3)), ("0,2,5", (0, 2, 5)), (" 7 , 1 - 2 ", (7, 1, 2)), (4, (4,)), ("0-0", (0,))],
)
def test_ids_are_numbers_and_ranges(value, ids):
    assert rules.hosted({"partition-ids": value}) == ids


def test_one_hosted_client_may_have_a_file_of_its_own():
    assert rules.hosted({"partition-ids": "3", "data": "x.jsonl"}) == (3,)
    assert rules.hosted({"partition-id": 3}) == ()


# parts


def state(seed: int) -> AdapterState:
    g = torch.Generator().manual_seed(seed)
    return AdapterState(lora={"q": LoraFactors(torch.randn(3, 6, generator=g), torch.randn(5, 3, generator=g), 2.0)})


def some_parts() -> dict[int, RecordDict | Error]:
    update = ClientUpdate(client_id=7, adapter=state(1), num_examples=10, metrics=METRICS)
    return {
        0: wire.encode_hello("abc"),
        2**64 - 1: wire.encode_broadcast(Broadcast(round=1, adapter=state(0), folds=(state(2),)), "abc"),
        7: wire.encode_update(update, "abc"),
        3: Error(1002, "behind"),
    }


def test_parts_come_out_as_they_went_in():
    sent = some_parts()
    whole = parts.join(sent)
    assert parts.is_joined(whole)
    assert not any(parts.is_joined(part) for part in sent.values() if isinstance(part, RecordDict))
    _, crossed, _ = envelope.unpack_request(envelope.pack_request("train", whole, Context(1, 2, {}, RecordDict(), {})))
    for arrived in (parts.split(whole, "x"), parts.split(crossed, "x")):
        assert arrived.keys() == sent.keys()
        error = arrived[3]
        assert isinstance(error, Error)
        assert (error.code, error.reason) == (1002, "behind")
        assert all(arrived[client] == sent[client] for client in (0, 7, 2**64 - 1))


@pytest.mark.parametrize("part", [RecordDict(), RecordDict({"error": ConfigRecord({})})])
def test_a_part_that_could_not_be_read_is_not_sent(part):
    with pytest.raises(WireError, match="client 4: a part needs records"):
        parts.join({4: part})


_ODD_NAMES = ["", "/", "0", "0/", "/head", "00/head", "-1/head", "+1/head", "1 /head", " 1/head", "1.0/head", "x/head"]
_ODD_NAMES += ["١/head", f"{2**64}/head", f"{10**30}/head", "head", "1\n/head", "\x1b[2J/head", "x" * 5000]
_ODD_ERRORS = [
    {},
    {"code": 1},
    {"reason": "x"},
    {"code": "1", "reason": "x"},
    {"code": True, "reason": "x"},
    {"code": 1.0, "reason": "x"},
    {"code": -1, "reason": "x"},
    {"code": 10**400, "reason": "x"},
    {"code": [1], "reason": "x"},
    {"code": 1, "reason": b"x"},
    {"code": 1, "reason": ["x"]},
    {"code": 1, "reason": "x", "more": 1},
]


@pytest.mark.parametrize("name", _ODD_NAMES)
def test_a_name_without_a_clients_id_is_refused(name):
    with pytest.raises(WireError, match=r"^node 4 sent the record .*, expected a client's id before it") as caught:
        parts.split(RecordDict({"0/head": ConfigRecord({}), name: ConfigRecord({})}), "node 4")
    assert len(str(caught.value)) < 300
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("content", _ODD_ERRORS, ids=",".join)
def test_a_malformed_error_is_refused(content):
    with pytest.raises(WireError, match=r"^node 4 sent a malformed error for client 1, expected"):
        parts.split(RecordDict({"1/error": ConfigRecord(content)}), "node 4")


@pytest.mark.parametrize(
    "more", [{"1/error": ArrayRecord()}, {"1/error": MetricRecord()}, {"1/head": ConfigRecord({})}]
)
def test_an_error_is_one_record_and_alone(more):
    error = ConfigRecord({"code": 1, "reason": "x"})
    with pytest.raises(WireError, match="malformed error for client 1, expected one record"):
        parts.split(RecordDict({"1/error": error, **more}), "node 4")


def test_thousands_of_spoiled_messages_give_parts_or_a_wire_error():
    rng = random.Random(0)
    whole, said = parts.join(some_parts()), []
    names = [*_ODD_NAMES, *whole, "5/head", "0/error", "0/error/head", "3/error "]
    records = [
        *whole.values(),
        *map(ConfigRecord, _ODD_ERRORS),
        MetricRecord({"code": 1}),
        ArrayRecord({"x": Array(dtype="object", shape=(10**9, -1), stype="x" * 99, data=b"\x80")}),
    ]
    for _ in range(3000):
        record = RecordDict({**whole})
        for _ in range(rng.randint(1, 4)):
            if record and rng.random() < 0.3:
                del record[rng.choice(list(record))]
            else:
                record[rng.choice(names)] = rng.choice(records)
        try:
            found = parts.split(record, "node 4")
        except WireError as error:
            said.append(str(error))
            continue
        assert parts.join(found) == record
    assert 1000 < len(said) < 3000
    assert max(map(len, said)) < 300
