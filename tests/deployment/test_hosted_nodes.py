"""Flower's real programs: two nodes that host four clients each learn what the in-process engine learns."""

import json
import re
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from fedlora import config as configuration
from fedlora.deployment.flower_programs import config_table
from fedlora.results import journal
from fedlora.results.run_folder import folder_of
from fedlora.simulations import run as simulation
from tests.deployment.programs import called, kept_running, make_site
from tests.device import DEVICE
from tests.federation import write_rows
from tests.simulations.engines.test_cohorts import apart
from tests.simulations.engines.test_local import saved_adapter

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
GUIDE = Path(__file__).resolve().parent.parent.parent / "docs" / "deployment.md"
HOSTED = {"left": [0, 1, 2, 3], "right": [4, 5, 6, 7]}


def example() -> tuple[str, list[str]]:
    """The config and the commands of the guide's section."""
    section = GUIDE.read_text(encoding="utf-8").split("## Several clients on one node")[1].split("\n## ")[0]
    [config] = re.findall(r"```toml\n(.*?)```", section, re.S)
    return config, [line for block in re.findall(r"```sh\n(.*?)```", section, re.S) for line in block.splitlines()]


@pytest.mark.nightly
def test_the_documented_commands_train_cohorts_on_two_nodes(tmp_path, tiny_llama):
    site = make_site(tmp_path)
    shown, commands = example()
    (tmp_path / "as-shown.toml").write_text(shown, encoding="utf-8")
    small = {
        "run.id": "one",
        "run.dir": str(tmp_path / "runs"),
        "run.threads": 1,
        "model.name": str(tiny_llama),
        "model.quantization": "none",
        "model.device": str(DEVICE),
        "lora.target-modules": "q_proj,v_proj",
        "data.source": str(write_rows(tmp_path / "rows.jsonl", people=8)),
        "data.partition-by": "person",
        "data.max-length": 64,
        "train.steps": 3,
        "train.batch-size": 2,
        "train.lr": 5e-3,
        "train.clients-at-once": "3",
        "evaluate.clients": True,
        "data.client-test-fraction": 0.2,
    }
    config = configuration.parse(small, configuration.load(tmp_path / "as-shown.toml"))
    (tmp_path / "cohorts.toml").write_text(config_table(config), encoding="utf-8")
    assert called("fedlora certs certs --nodes left,right", site).returncode == 0
    done = []
    with ExitStack() as running:
        serve = "fedlora server --certs certs --port $PORT --state state/server"
        running.enter_context(kept_running(serve, site, "server: listening on"))
        known = called("fedlora register certs/left.pub certs/right.pub --server $SERVER --ca certs/ca.crt", site)
        assert known.returncode == 0, known.stderr
        for command in commands:
            done.append(command.split()[1])
            if done[-1] == "node":
                running.enter_context(kept_running(command, site, "node: started for the server"))
            else:
                ended = called(command, site)
                assert ended.returncode == 0, ended.stdout + ended.stderr
    assert done == ["node", "node", "run"]
    result = json.loads((folder_of(config) / "result.json").read_text())
    assert result["status"] == "completed"
    assert [set(entry["clients"]) for entry in result["rounds"]] == [set("01234567")] * 2
    assert all(set(entry["client-test"]["clients"]) == set("01234567") for entry in result["rounds"])
    for name, clients in HOSTED.items():
        events = journal.read(tmp_path / "state" / name / journal.NAME)
        trained = [(event["round"], event["client_id"]) for event in events if event["event"] == "client-trained"]
        assert sorted(trained) == [(number, client) for number in (1, 2) for client in clients]
        # who they are, two rounds of training, two of evaluation: one message each
        assert [event["task"] for event in events if event["event"] == "message-answered"] == [
            "describe", *["train", "evaluate"] * 2
        ]  # fmt: skip
        assert sum(event["event"] == "worker-start" for event in events) == 1
    here = replace(config, run=replace(config.run, id="here"))
    simulation.in_process(here)
    assert apart(saved_adapter(folder_of(here)), saved_adapter(folder_of(config))) < 1e-4


def test_what_no_node_can_host_is_refused_before_it_starts(tmp_path):
    site = make_site(tmp_path)
    (tmp_path / "rows.jsonl").write_text("{}\n", encoding="utf-8")
    for options, says in [
        ("--partition-ids 3-0", "expected numbers of clients, at most 4096, such as '0-3' or '0,2,5'"),
        ("--partition-ids 0-3 --partition-id 0", "partition-id and partition-ids both say which clients are here"),
        ("--partition-ids 0-3 --data rows.jsonl", "data names the rows of one client"),
    ]:
        ended = called(f"fedlora node --insecure --server $SERVER --state state {options}", site, timeout=60)
        assert ended.returncode == 1
        assert says in ended.stderr
        assert "Traceback" not in ended.stderr
    assert not (tmp_path / "state").exists()
