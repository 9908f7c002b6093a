"""The server's audit log: who handed in what, who answered what, who was refused for what."""

import hashlib
import json

import pytest
from flwr.app import Error, Message

from fedlora.clients.client_app import app as client_app
from fedlora.common.errors import RunError
from fedlora.exchange import wire
from fedlora.results import journal
from fedlora.results.run_folder import folder_of
from fedlora.simulations import run as simulation
from fedlora.strategies.server import audit
from tests.federation import tiny


def test_a_servers_log_says_who_did_what(tmp_path, tiny_llama, fresh_process, monkeypatch):
    path = tmp_path / "server" / "audit.jsonl"
    monkeypatch.setenv(audit.VARIABLE, str(path))
    config = tiny(tmp_path, tiny_llama, federation__rounds=1, run__by="ada@lab")
    replies: dict[int, str] = {}

    def answer(message: Message, context) -> Message:
        if message.metadata.message_type == "train" and context.node_config["partition-id"] == 2:
            return Message(Error(wire.REFUSED, "not today"), reply_to=message)
        reply = client_app(message, context)
        if message.metadata.message_type == "train":
            data = reply.content.array_records["adapter"]["tensors"].data
            replies[context.node_config["partition-id"]] = hashlib.sha256(data).hexdigest()
        return reply

    simulation.in_process(config, client_app=answer)
    lines = journal.read(path)
    [begun] = [line for line in lines if line["event"] == "run-submitted"]
    assert begun["by"] == "ada@lab"
    assert begun["config"] == config.to_flat()
    assert begun["config_sha256"] == hashlib.sha256(json.dumps(config.to_flat(), sort_keys=True).encode()).hexdigest()
    assert len({line["run"] for line in lines}) == 1
    assert [line["client_id"] for line in lines if line["event"] == "client-met"] == [0, 1, 2, 3]
    done = {line["client_id"]: line["sha256"] for line in lines if line["event"] == "client-answered"}
    assert done == replies
    [failed] = [line for line in lines if line["event"] == "client-failed"]
    assert (failed["client_id"], failed["round"], failed["reason"]) == (2, 1, "client 2 refused: not today")
    assert lines[-1]["event"] == "run-ended"
    assert lines[-1]["status"] == "completed"
    assert not [line for line in lines if line["event"].endswith("-step")]
    # runs of one server share it, one that fails too
    other = tiny(tmp_path, tiny_llama, run__id="two", federation__min_clients=4, federation__rounds=1)
    with pytest.raises(RunError):
        simulation.in_process(other, client_app=answer)
    assert journal.read(path)[-1]["status"] == "failed"
    assert "not today" in journal.read(path)[-1]["reason"]
    assert len({line["run"] for line in journal.read(path)}) == 2
    assert (folder_of(other) / "result.json").is_file()


def test_without_a_server_there_is_none(monkeypatch):
    monkeypatch.delenv(audit.VARIABLE, raising=False)
    assert audit.digest(wire.encode_hello("x")) == ""
