"""Who is which client: keys that ids belong to, and what one node may claim."""

from __future__ import annotations

import json
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedlora import wire
from fedlora.config import parse
from fedlora.errors import RunError
from fedlora.exchange import ClientInfo
from fedlora.simulations import local
from fedlora.strategies import bindings, roster

BASE = "abc123"


class Registered(local.LocalGrid):
    """Nodes with keys, known since some time; each says that it is the client that `claims` names."""

    def __init__(self, claims: dict[int, int], keys: dict[int, bytes], since: dict[int, str] | None = None) -> None:
        app = ClientApp()

        @app.query()
        def describe(message: Message, context: Context) -> Message:
            info = ClientInfo(client_id=claims[context.node_id], rank=4, num_examples=10)
            return Message(wire.encode_info(info, BASE), reply_to=message)

        super().__init__(app, [{} for _ in claims], {}, 1)
        self._about = [
            SimpleNamespace(node_id=node, public_key=keys.get(node, b""), registered_at=(since or {}).get(node, ""))
            for node in claims
        ]

    def get_nodes(self) -> Iterable[Any]:
        return self._about


def met(claims: dict[int, int], keys: dict[int, bytes], since: dict[int, str] | None = None) -> dict[int, int]:
    """Client id -> the node that is that client."""
    config = parse({"federation.clients": 4, "federation.wait-timeout": 0.0, "lora.rank-pattern": ""})
    return roster.meet(Registered(claims, keys, since), config, BASE).nodes


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


@pytest.mark.parametrize("text", ["", "[]", '{"x": "y"}', '{"0": 3}', "{"])
def test_a_damaged_file_of_keys_is_named(server, text):
    server.write_text(text)
    with pytest.raises(RunError, match=r"client-keys\.json: the keys of clients cannot be read: .*; put a copy back"):
        met({2: 0}, {2: b"alpha"})
