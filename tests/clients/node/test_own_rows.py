"""Rows that are not those that a node had are noticed on the node, and told to nobody else."""

import json
import os

from flwr.app import Context, Message, RecordDict

from fedlora.clients.client_app import app as client_app
from fedlora.clients.node import own_rows
from fedlora.common.events import listen
from fedlora.exchange import wire
from fedlora.models import base_fingerprint
from fedlora.results import journal
from fedlora.simulations.engines import local
from tests.federation import tiny, write_rows


def looked(settings: dict) -> list[dict]:
    seen: list[dict] = []
    with listen(lambda kind, facts: seen.append(facts) if kind == "rows-changed" else None):
        own_rows.look(settings)
    return seen


def test_other_rows_of_the_same_size_are_noticed_once(tmp_path, caplog):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "a", "response": "b"}\n')
    settings = {"data": str(data), "state": str(tmp_path)}
    assert looked(settings) == []
    assert looked(settings) == []
    data.write_text('{"prompt": "a", "response": "c"}\n')
    os.utime(data, ns=(1, 1))
    [change] = looked(settings)
    assert change["before"]["bytes"] == change["now"]["bytes"]
    assert change["before"]["sha256"] != change["now"]["sha256"]
    assert "the rows of this node have changed since" in caplog.text
    assert looked(settings) == []
    kept = json.loads((tmp_path / own_rows.NAME).read_text())
    assert set(kept) == {"sha256", "bytes", "since"}
    os.utime(data, ns=(2, 2))  # touched, and the same
    assert looked(settings) == []
    (tmp_path / own_rows.NAME).write_text("{")
    assert looked(settings) == []
    assert looked({"data": str(data)}) == looked({"state": str(tmp_path)}) == []


def test_a_node_tells_its_own_log_and_nobody_else(tmp_path, tiny_llama):
    data = write_rows(tmp_path / "own.jsonl", people=1)
    config = tiny(tmp_path, tiny_llama)
    settings = {"partition-id": 0, "data": str(data), "state": str(tmp_path / "state"), "allow-files": True}

    def hello() -> Message:
        fingerprint = base_fingerprint(config.model)
        context = Context(1, 2, settings, RecordDict(), config.to_flat())
        grid = local.LocalGrid(client_app, [settings], config.to_flat(), 1)
        [message] = [Message(wire.encode_hello(fingerprint), 2, "query", group_id="0")]
        del context
        [answer] = grid.send_and_receive([message])
        assert not answer.has_error(), answer.error.reason
        return answer

    (tmp_path / "state").mkdir()
    before = hello()
    text = data.read_text()
    data.write_text(text.replace("ash", "elm"))
    after = hello()
    events = [event["event"] for event in journal.read(tmp_path / "state" / journal.NAME)]
    assert events.count("rows-changed") == 1
    assert before.content == after.content, "the server is told what it was told before"
