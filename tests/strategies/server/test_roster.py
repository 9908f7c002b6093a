"""Who is which client: keys that ids belong to, and what one node may claim."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedlora.common.errors import RunError
from fedlora.config import Config, Scalar, parse
from fedlora.exchange import ClientInfo, parts, wire
from fedlora.simulations.engines import local
from fedlora.strategies.server import bindings, roster

BASE = "abc123"
Claims = Mapping[int, int | list[int]]


class Registered(local.LocalGrid):
    """Nodes with keys, known since some time; each says that it is the client, or the clients, that `claims` names."""

    names: ClassVar[dict[bytes, str]] = {}  # that keys were registered under

    def __init__(self, claims: Claims, keys: dict[int, bytes], since: dict[int, str] | None = None) -> None:
        app = ClientApp()

        @app.query()
        def describe(message: Message, context: Context) -> Message:
            claim = claims[context.node_id]
            if isinstance(claim, list):
                return Message(parts.join({client: told(client) for client in claim}), reply_to=message)
            return Message(told(claim), reply_to=message)

        super().__init__(app, [{} for _ in claims], {}, 1)
        self._about = [
            SimpleNamespace(
                node_id=node,
                name=self.names.get(keys.get(node, b""), ""),
                public_key=keys.get(node, b""),
                registered_at=(since or {}).get(node, ""),
            )
            for node in claims
        ]

    def get_nodes(self) -> Iterable[Any]:
        return self._about


def told(client: int, rank: int = 4) -> RecordDict:
    return wire.encode_info(ClientInfo(client_id=client, rank=rank, num_examples=10), BASE)


def meet(grid: Registered, config: Config) -> roster.Roster:
    """Who takes part, once the meeting has begun."""
    meeting = roster.Meeting(grid, config, BASE)
    meeting.begin()
    return meeting.roster


def met(
    claims: Claims, keys: dict[int, bytes], since: dict[int, str] | None = None, **federation: Scalar
) -> dict[int, int]:
    """Client id -> the node that is that client."""
    keys_of = {f"federation.{key.replace('_', '-')}": value for key, value in federation.items()}
    config = parse({"federation.clients": 4, "federation.wait-timeout": 0.0, "lora.rank-pattern": ""} | keys_of)
    return meet(Registered(claims, keys, since), config).nodes


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The state of a server with node authentication."""
    path = tmp_path / "client-keys.json"
    monkeypatch.setenv(bindings.VARIABLE, str(path))
    return path


def test_an_id_belongs_to_the_key_that_used_it_first(server, caplog):
    assert met({2: 0, 3: 1}, {2: b"alpha", 3: b"beta"}) == {0: 2, 1: 3}
    assert list(json.loads(server.read_text())) == ["0", "1"]
    # another key claims client 1, whose own node is away
    assert met({2: 0, 3: 1}, {2: b"alpha", 3: b"mallory"}) == {0: 2}
    assert "node 3 says that it is client 1, and is refused: the id belongs to another node's key" in caplog.text
    assert str(server) in caplog.text
    # the same key comes back under another node id
    assert met({2: 1, 3: 0}, {2: b"beta", 3: b"alpha"}) == {1: 2, 0: 3}


def test_a_key_that_replaces_one_has_its_name_and_its_client(server, monkeypatch):
    monkeypatch.setattr(Registered, "names", {b"alpha": "north", b"beta": "south", b"gamma": "north"})
    assert met({2: 0, 3: 1}, {2: b"alpha", 3: b"beta"}) == {0: 2, 1: 3}
    assert json.loads(server.read_text()) == {"0": "north", "1": "south"}
    assert met({2: 1, 3: 0}, {2: b"beta", 3: b"gamma"}) == {1: 2, 0: 3}
    with pytest.raises(RunError, match="0 of 4 clients connected"):
        met({2: 1}, {2: b"gamma"})


def test_a_key_that_has_an_id_gets_no_other(server, caplog):
    met({2: 0}, {2: b"alpha"})
    with pytest.raises(RunError, match="0 of 4 clients connected"):
        met({2: 3}, {2: b"alpha"})
    assert "node 2 says that it is client 3, and is refused: its key belongs to client 0" in caplog.text


def test_of_two_new_keys_the_one_that_registered_first_keeps_the_id(server):
    since = {2: "2026-01-02", 3: "2026-01-01"}
    assert met({2: 1, 3: 1}, {2: b"late", 3: b"early"}, since) == {1: 3}
    assert met({2: 1, 3: 1}, {2: b"early", 3: b"late"}) == {1: 2}


def test_without_a_servers_state_ids_are_free_from_run_to_run():
    """Without node authentication a node that is started again has another id, and no key."""
    assert met({2: 0, 3: 1}, {}) == {0: 2, 1: 3}
    assert met({2: 1, 3: 0}, {}) == {1: 2, 0: 3}
    assert met({2: 0, 3: 0}, {}) == {0: 2}


TEN = list(range(10, 20))


@pytest.mark.parametrize("hostile", [2, 5])
def test_a_node_that_says_it_is_ten_clients_does_not_outnumber_the_others(hostile, caplog):
    """Whoever answers first: of four clients, those of nodes with fewer come first."""
    honest = [node for node in range(2, 6) if node != hostile]
    claims: dict[int, int | list[int]] = {hostile: TEN} | {node: client for client, node in enumerate(honest)}
    found = met(claims, {})
    assert len(found) == 4
    assert {client: node for client, node in found.items() if node != hostile} == dict(enumerate(honest))
    assert "stays out: federation.clients = 4" in caplog.text


def test_who_took_part_before_comes_before_who_is_new(server):
    keys = {2: b"mallory", 3: b"left", 4: b"right"}
    assert met({2: 99, 3: [0, 1], 4: [2, 3]}, keys, {2: "1", 3: "2", 4: "3"}, clients=5) == {
        99: 2,
        0: 3,
        1: 3,
        2: 4,
        3: 4,
    }
    # a new key with one client, against known ones with two each
    keys = {2: b"new", 3: b"left", 4: b"right"}
    assert met({2: 50, 3: [0, 1], 4: [2, 3]}, keys, {2: "0"}) == {0: 3, 1: 3, 2: 4, 3: 4}


def test_the_number_of_a_keys_clients_is_bound_too(server, caplog):
    assert met({2: [0, 1]}, {2: b"left"}) == {0: 2, 1: 2}
    assert met({2: [0, 1, 2, 3]}, {2: b"left"}) == {0: 2, 1: 2}
    assert "node 2 says that it is client 2, and is refused: its key belongs to client 0" in caplog.text


def test_a_node_with_more_clients_than_the_run_allows_is_refused(caplog):
    assert met({2: [0, 1, 2], 3: 3}, {}, max_hosted=2) == {3: 3}
    assert "node 2 says that it hosts 3 clients, and is refused: federation.max-hosted = 2" in caplog.text
    assert met({2: [0, 1], 3: 3}, {}, max_hosted=2) == {0: 2, 1: 2, 3: 3}


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"lora.ranks": "2,1"}, "has rank 4, but the largest of lora.ranks is 2"),
        ({"lora.ranks": "", "lora.rank": 3}, "has rank 4, but the largest of lora.ranks is 3"),
        ({"lora.ranks": "8", "federation.max-rank": 2}, "has rank 4, but federation.max-rank = 2"),
    ],
)
def test_a_rank_beyond_the_runs_is_refused_before_the_run(keys, says):
    config = parse({"federation.wait-timeout": 0.0, **keys})
    with pytest.raises(RunError, match=f"node 2 {says}"):
        meet(Registered({2: 0}, {}), config)


def test_a_larger_rank_may_be_allowed():
    config = parse({"federation.wait-timeout": 0.0, "lora.ranks": "2", "federation.max-rank": 4})
    assert meet(Registered({2: 0}, {}), config).infos[0].rank == 4


@pytest.mark.parametrize("text", ["", "[]", '{"x": "y"}', '{"0": 3}', "{"])
def test_a_damaged_file_of_keys_is_named(server, text):
    server.write_text(text)
    with pytest.raises(RunError, match=r"client-keys\.json: the keys of clients cannot be read: .*; put a copy back"):
        met({2: 0}, {2: b"alpha"})


def counting(node: int, told: Mapping[int, RecordDict]) -> tuple[roster.Meeting, list[str]]:
    """A meeting with one node that hosts these clients, and the reasons with which it has refused some."""
    grid = Registered({node: [*told]}, {})
    grid._app = ClientApp()
    grid._app.query()(lambda message, context: Message(parts.join(told), reply_to=message))
    config = parse({"federation.clients": 8, "federation.wait-timeout": 0.0, "lora.rank-pattern": ""})
    meeting = roster.Meeting(grid, config, BASE)
    meeting.begin()
    return meeting, meeting.roster.refusals


def test_a_client_of_an_edge_that_is_asked_again_is_refused_once():
    infos = [
        ClientInfo(client_id=client, rank=rank, num_examples=10, edges=("west",)) for client, rank in ((0, 4), (1, 999))
    ]
    meeting, refusals = counting(2, {info.client_id: wire.encode_info(info, BASE) for info in infos})
    for _ in range(3):
        assert meeting.welcome() == []
    assert len(refusals) == 1
    assert "rank 999" in refusals[0]


def test_a_client_with_other_classes_is_refused_once():
    infos = [
        ClientInfo(client_id=c, rank=4, num_examples=10, class_names=("a", "b") if c else ("b", "a")) for c in range(3)
    ]
    meeting, refusals = counting(2, {info.client_id: wire.encode_info(info, BASE) for info in infos})
    assert meeting.welcome() == []
    assert len(refusals) == 1
    assert {*meeting.roster.infos} == {*meeting.roster.nodes} == {1, 2}
