"""Where a run stands, read from its folder at every moment of its life."""

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from fedlora.cli import main
from fedlora.common.errors import RunError
from fedlora.common.events import listen
from fedlora.results.display import status_table
from fedlora.results.run_folder import folder_of
from fedlora.results.status import ClientStatus, RunStatus, status
from fedlora.simulations import run as simulation
from tests.federation import run_locally, tiny


def test_a_run_that_is_complete(tmp_path, tiny_llama):
    folder, result = run_locally(tiny(tmp_path, tiny_llama, evaluate__clients=True))
    found = status(folder.parent)  # the last of this name
    assert (found.folder, found.status, found.round, found.rounds) == (folder, "completed", 2, 2)
    assert found.heldout == result["rounds"][-1]["heldout"]
    last = result["rounds"][-1]
    for client in found.clients:
        answer = last["clients"][str(client.client_id)]
        assert (client.round, client.train_loss) == (2, answer["train-loss"])
        assert client.test_loss == last["client-test"]["clients"][str(client.client_id)]["loss"]
    shown = CliRunner().invoke(main.app, ["status", str(folder)])
    assert shown.exit_code == 0
    assert "completed: 2 of 2 rounds; held-out loss" in shown.output.replace("\n", " ")


def test_a_run_in_the_middle_of_a_round_and_one_that_died(tmp_path, tiny_llama):
    config = tiny(tmp_path, tiny_llama)
    seen = []

    def look(kind, facts):
        if kind == "client-done" and (facts["round"], facts["client_id"]) == (2, 1):
            seen.append(status(folder_of(config)))
            raise KeyboardInterrupt

    with listen(look), pytest.raises(KeyboardInterrupt):
        simulation.in_process(config)
    [now] = seen
    assert (now.status, now.round) == ("running", 1)
    assert now.quiet_seconds is not None
    assert now.quiet_seconds < 60
    first, second, *others = [client.note for client in now.clients]
    assert first == "round 2: answered"
    assert second.startswith(("round 2: trains", "round 2: step"))
    assert others == ["", ""]
    assert status(folder_of(config)).status == "interrupted"
    path = folder_of(config) / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"status": "running"}))
    died = CliRunner().invoke(main.app, ["status", str(folder_of(config))])
    assert "died: 1 of 2 rounds" in died.output.replace("\n", " ")
    assert f"fedlora run --resume {folder_of(config)}" in died.output.replace("\n", "")


def test_of_very_many_clients_those_at_work_are_shown(tmp_path):
    clients = [ClientStatus(client_id=i, rank=8, round=i % 5, train_loss=1.0) for i in range(100)]
    clients[3] = replace(clients[3], note="round 5: step 1 of 4")
    table = status_table(RunStatus(tmp_path, "running", "", 4, 6, {}, 1.0, clients))
    assert table.row_count == 21  # twenty of round 4, one of round 5
    assert table.caption == "21 of 100 clients: those of this round and the last"
    assert status_table(RunStatus(tmp_path, "running", "", 4, 6, {}, 1.0, clients[:40])).row_count == 40


def test_there_is_no_run(tmp_path):
    with pytest.raises(RunError, match=r"no run here, result\.json is missing"):
        status(tmp_path)
