"""Flower's real programs on this machine: the documented commands, and what goes wrong in one sentence."""

import json
import re
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import ExitStack
from pathlib import Path

import pytest
from safetensors.torch import load_file

from fedlora import config as configuration
from fedlora.common.processes import free_port
from fedlora.deployment.flower_programs import config_table
from tests.deployment.programs import called, kept_running, make_site
from tests.device import DEVICE
from tests.federation import tiny, write_rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
ROOT = Path(__file__).resolve().parent.parent.parent
GUIDE = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
RANKS = {0: 16, 1: 8, 2: 4}


def example() -> tuple[str, list[list[str]]]:
    """The config, and the commands in their order, of the section that shows a whole federation."""
    section = GUIDE.split("## One server, three nodes")[1].split("\n## ")[0]
    config = re.findall(r"```toml\n(.*?)```", section, re.S)
    commands = [line for block in re.findall(r"```sh\n(.*?)```", section, re.S) for line in block.splitlines()]
    assert len(config) == 1
    return config[0], commands


@pytest.fixture
def site(tmp_path):
    return make_site(tmp_path)


def test_the_documented_commands_run_a_federation(site, tiny_llama):
    folder = site[0]
    shown, commands = example()
    assert commands.pop(0).startswith("export ")
    (folder / "as-shown.toml").write_text(shown, encoding="utf-8")
    config = configuration.load(folder / "as-shown.toml")
    assert config.federation.clients == len(RANKS)
    small = {
        "model.name": str(tiny_llama),
        "model.quantization": "none",
        "model.device": str(DEVICE),
        "lora.target-modules": "q_proj,v_proj",
        "federation.rounds": 2,
        "federation.min-clients": 3,
        "train.steps": 2,
        "run.id": "one",
        "run.threads": 1,
    }
    (folder / "federation.toml").write_text(config_table(configuration.parse(small, config)), encoding="utf-8")
    rows = write_rows(folder / "rows.jsonl", people=3).read_text(encoding="utf-8").splitlines()
    for person, name in enumerate(["north", "south", "west"]):
        own = [row for row in rows if f'"p{person}"' in row]
        (folder / f"{name}.jsonl").write_text("\n".join(own) + "\n", encoding="utf-8")
    done = 0
    with ExitStack() as running:
        for command in commands:
            if command.startswith("fedlora server "):
                running.enter_context(kept_running(command, site, "server: listening on"))
            elif command.startswith("fedlora node "):
                running.enter_context(kept_running(command, site, "node: started for the server"))
            else:
                ended = called(command, site, timeout=1200)
                assert ended.returncode == 0, ended.stdout + ended.stderr
            done += 1
    assert done == 10
    results = folder / "runs" / "hospitals" / "one"
    record = json.loads((results / "result.json").read_text())
    assert record["status"] == "completed"
    assert record["simulated"] is False  # so that no report draws rows
    assert {client["client-id"]: client["rank"] for client in record["clients"]} == RANKS
    assert [len(entry["clients"]) for entry in record["rounds"]] == [3, 3]
    assert all(entry["client-test"]["mean"]["loss"] > 0 for entry in record["rounds"])
    assert any(
        tensor.abs().sum() > 0 for tensor in load_file(results / "adapter" / "adapter_model.safetensors").values()
    )
    keys = json.loads((folder / "state" / "server" / "client-keys.json").read_text())
    assert keys == {"0": "north", "1": "south", "2": "west"}
    assert not (folder / "never-used").exists()


def refused(command: str, site, says: str) -> None:
    done = called(command, site, timeout=200)
    assert done.returncode == 1, done.stdout + done.stderr
    assert says in done.stderr, done.stderr
    assert "Traceback" not in done.stderr + done.stdout


def test_what_goes_wrong_is_one_sentence(site):
    folder, environment = site
    for command in ("certs certs --nodes north,stranger", "certs other"):
        assert called(f"fedlora {command}", site).returncode == 0
    refused("fedlora register certs/north.pub --server $SERVER --ca certs/ca.crt", site, "no server answers at 127.0.0")
    with kept_running("fedlora server --certs certs --port $PORT --state server", site, "server: listening on"):
        refused("fedlora server --certs certs --port $PORT --state two", site, "Address already in use")
        refused(
            f"fedlora server --certs certs --port {free_port()} --state server", site, "another server or node uses"
        )
        wrong = "--server $SERVER --ca other/ca.crt"
        refused(f"fedlora register certs/north.pub {wrong}", site, "does not pass with")
        refused(f"fedlora run quickstart {wrong}", site, "does not pass with")
        refused(f"fedlora node {wrong} --key certs/north --state north", site, "does not pass with")
        plain = "--server $SERVER --insecure"
        refused(f"fedlora run quickstart {plain}", site, "does not speak plain HTTP")
        refused("fedlora register certs/ca.crt --server $SERVER --ca certs/ca.crt", site, "holds no public key")
        for answer in ("registered as north, node", "registered already, as north"):
            done = called("fedlora register certs/north.pub --server $SERVER --ca certs/ca.crt", site)
            assert answer in done.stdout, done.stderr
        impatient = (
            "from pathlib import Path; from fedlora.deployment import node; "
            f"node.join({environment['SERVER']!r}, Path('certs/ca.crt'), Path('certs/stranger'), "
            "node_config={}, state=Path('stranger'), patience=0)"
        )
        done = subprocess.run(
            [sys.executable, "-c", impatient],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert "refuses this node's key" in done.stderr
        assert "[code: 2004] Failed to activate SuperNode" in done.stderr


@pytest.mark.nightly
def test_without_tls_a_server_takes_runs_and_says_why_one_fails(site, tiny_llama):
    folder, environment = site
    (folder / "run.toml").write_text(
        config_table(tiny(folder, tiny_llama, federation__wait_timeout=1.0)), encoding="utf-8"
    )
    with kept_running("fedlora server --insecure --port $PORT --state server", site, "server: listening on"):
        refused("fedlora run run.toml --server $SERVER --ca run.toml", site, "holds no certificate in PEM format")
        refused("fedlora run run.toml --server $SERVER --insecure", site, "0 of 4 clients connected within 1 s")
        # The part of the port that hands out apps answers nobody who lacks the secret.
        asked = urllib.request.Request(
            f"http://{environment['SERVER']}/v1/runtime/acquire-task",
            data=b"",
            headers={"content-type": "application/protobuf"},
        )
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(asked, timeout=10)
    assert "warning: --insecure" in "".join(path.read_text() for path in folder.glob("*.out"))
