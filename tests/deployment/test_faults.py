"""A federation whose node, worker and SuperLink are killed for real: it completes, bit-equal to what it counted."""

import json
import os
import re
import signal
import subprocess
import tomllib
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from fedlora.deployment.flower_programs import config_table
from fedlora.results import journal
from fedlora.results.run_folder import folder_of
from fedlora.simulations import run as simulation
from tests.deployment.programs import (
    answered,
    begun,
    called,
    kept_running,
    kill_with_all,
    make_site,
    missing,
    until,
    words,
)
from tests.federation import tiny

pytestmark = [pytest.mark.slow, pytest.mark.nightly, pytest.mark.timeout(1800)]
NODES = ("north", "south", "west")
ROUNDS = 7


def node(person: int, name: str) -> str:
    joins = f"fedlora node --server $SERVER --ca certs/ca.crt --key certs/{name}"
    return f"{joins} --partition-id {person} --state state/{name}"


def events(folder: Path, kind: str, **facts) -> list[dict]:
    return [
        event
        for event in journal.read(folder / journal.NAME)
        if event["event"] == kind and all(event.get(name) == value for name, value in facts.items())
    ]


def worker_of(state: Path) -> psutil.Process:
    socket = Path(tomllib.loads((state / "node.toml").read_text())["worker"])
    return psutil.Process(int(socket.with_name("worker.pid").read_text()))


def kill(process: psutil.Process) -> None:
    os.kill(process.pid, signal.SIGKILL)


def superlink(port: str) -> psutil.Process:
    [found] = [
        process
        for process in psutil.process_iter(["cmdline"])
        if "flower-superlink" in " ".join(process.info["cmdline"] or []) and port in process.info["cmdline"]
    ]
    return found


def test_what_is_killed_comes_back_and_the_run_completes(tmp_path, tiny_llama):
    site = make_site(tmp_path)
    folder, environment = site
    config = tiny(
        tmp_path,
        tiny_llama,
        strategy__name="flora",
        lora__ranks="4,2,1",
        federation__clients=3,
        federation__min_clients=2,
        federation__rounds=ROUNDS,
        federation__round_timeout=120.0,
        train__steps=80,
        train__lr=1e-3,
        data__partition="iid",
        run__dir=str(tmp_path / "runs"),
    )
    (folder / "run.toml").write_text(config_table(config), encoding="utf-8")
    run = folder_of(config)
    assert called("fedlora certs certs --nodes north,south,west", site).returncode == 0
    state = {name: folder / "state" / name for name in NODES}
    with (
        ExitStack() as others,
        kept_running("fedlora server --certs certs --port $PORT --state state/server", site, "server: listening on"),
    ):
        keys = "certs/north.pub certs/south.pub certs/west.pub"
        assert called(f"fedlora register {keys} --server $SERVER --ca certs/ca.crt", site).returncode == 0
        for person, name in enumerate(NODES[:2]):
            others.enter_context(kept_running(node(person, name), site, "node: started for the server"))
        doomed, family, _ = others.enter_context(begun(node(2, "west"), site, "node: started for the server"))
        command = words("fedlora run run.toml --server $SERVER --ca certs/ca.crt", environment)
        with (folder / "run.out").open("w") as output:
            running = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=output)
        try:
            # a node in the middle of its training, with all that belongs to it
            until(lambda: events(state["west"], "client-step", round=2), "west trains in round 2")
            kill_with_all(doomed, [worker_of(state["west"]), *family], seconds=60)
            others.enter_context(kept_running(node(2, "west"), site, "node: started for the server"))
            # a worker in the middle of its training
            until(lambda: events(state["north"], "client-step", round=3), "north trains in round 3")
            kill(worker_of(state["north"]))
            back = until(
                lambda: [e["round"] for e in events(run, "client-done", client_id=2) if e["round"] > 2],
                "west is back in the run",
            )
            # the SuperLink, as replies are on their way to it
            struck = back[0] + 1
            until(lambda: events(state["south"], "client-trained", round=struck), "south trained in the next round")
            kill(superlink(environment["PORT"]))
            assert running.wait(timeout=500) == 0, (folder / "run.out").read_text()
        finally:
            running.kill()
            running.wait()
    result = json.loads((run / "result.json").read_text())
    assert result["status"] == "completed"
    counted = answered(run)
    assert counted[1] == {0, 1, 2}
    assert counted[2] == {0, 1}
    assert 0 in counted[3], "a worker that was killed once answers"
    assert len(events(state["north"], "worker-start")) == 2
    assert counted[struck] == counted[ROUNDS] == {0, 1, 2}, "what a killed SuperLink lost was asked again"
    assert "starting it again" in "".join(path.read_text() for path in folder.glob("*.out"))
    failures = {entry["round"]: entry["failures"] for entry in result["rounds"]}
    assert re.match("client 2 (failed|did not answer)", failures[2]["2"])
    # The same rounds in one process, with the same clients away: equal to the last bit, folds of late clients included.
    again = replace(config, run=replace(config.run, id="again"))
    simulation.in_process(again, client_app=missing(counted))
    one, two = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (run, folder_of(again)))
    assert one.keys() == two.keys()
    assert all(one[name].equal(two[name]) for name in one)
    shown = called(f"fedlora status {run}", site)
    assert shown.returncode == 0
    assert f"completed: {ROUNDS} of {ROUNDS} rounds" in shown.stdout
