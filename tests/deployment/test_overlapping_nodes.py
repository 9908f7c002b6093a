"""Rounds that do not wait for all, over real nodes: what is killed comes back, and the run goes on."""

import json
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import pytest
from safetensors.torch import load_file

from fedlora.common.processes import free_port
from fedlora.deployment import certificates, nodes
from fedlora.deployment.flower_programs import config_table
from fedlora.results.run_folder import folder_of, is_taken
from tests.deployment.programs import begun, called, kept_running, kill_with_all, listens, make_site, started, until
from tests.deployment.test_faults import NODES, events, kill, node, superlink, worker_of
from tests.federation import tiny

pytestmark = [pytest.mark.slow, pytest.mark.nightly, pytest.mark.timeout(2400)]
SERVES = "fedlora server --certs certs --port $PORT --state state/server"
WAIT = 600.0  # seconds
ROUNDS = {"buffered": 20, "fedasync": 30, "deadline": 32}  # more than pass until all has been killed
OPTIONS = {
    "buffered": "size=2, at_once=3",
    "fedasync": "at_once=3",
    "deadline": "seconds=8, more=0.5",
}


def entries(run: Path) -> list[dict]:
    return json.loads((run / "result.json").read_text())["rounds"] if (run / "result.json").is_file() else []


@pytest.mark.parametrize("schedule", ROUNDS)
def test_what_is_killed_comes_back_and_no_update_counts_twice(tmp_path, tiny_llama, schedule):
    site = make_site(tmp_path)
    folder, environment = site
    config = tiny(
        tmp_path,
        tiny_llama,
        strategy__name="flora",
        lora__ranks="4,2,1",
        federation__clients=3,
        federation__fraction=0.67,
        federation__min_clients=1,
        federation__rounds=ROUNDS[schedule],
        federation__schedule=schedule,
        federation__schedule_options=OPTIONS[schedule],
        federation__round_timeout=300.0,
        federation__wait_timeout=300.0,
        train__steps=80,
        train__lr=1e-3,
        data__partition="iid",
        run__dir=str(tmp_path / "runs"),
    )
    (folder / "run.toml").write_text(config_table(config), encoding="utf-8")
    run = folder_of(config)
    certificates.make(folder / "certs", nodes=["north", "south", "coast"])
    certificates.make(folder / "coast", nodes=["west"])
    port, below = free_port(), folder / "coast" / "ca.crt"
    edge = (
        f"fedlora edge --server $SERVER --ca certs/ca.crt --key certs/coast --clients 1 --certs coast --port {port} "
        "--state state/coast"
    )
    west = (
        f"fedlora node --server 127.0.0.1:{port} --ca coast/ca.crt --key coast/west --partition-id 2 --state state/west"
    )
    state = {name: folder / "state" / name for name in NODES}

    def trains(name: str) -> bool:
        """Whether a node is in the middle of a training that it began after this question was first put."""
        return len(events(state[name], "client-step")) > steps.setdefault(name, len(events(state[name], "client-step")))

    steps: dict[str, int] = {}
    with ExitStack() as others:
        server, family, _ = others.enter_context(begun(SERVES, site, "server: listening on"))
        keys = [folder / "certs" / f"{name}.pub" for name in ("north", "south", "coast")]
        nodes.register(keys, environment["SERVER"], folder / "certs" / "ca.crt")
        for person, name in enumerate(NODES[:2]):
            others.enter_context(begun(node(person, name), site, "node: started for the server"))
        region, _, _ = others.enter_context(begun(edge, site, ""))
        until(lambda: listens(f"127.0.0.1:{port}", below), "the edge listens", WAIT)
        nodes.register([folder / "coast" / "west.pub"], f"127.0.0.1:{port}", below)
        doomed, its, _ = others.enter_context(begun(west, site, "node: started for the server"))
        running = started("fedlora run run.toml --server $SERVER --ca certs/ca.crt", site, "run.out")
        try:
            until(lambda: trains("west"), "west trains", WAIT)
            kill_with_all(doomed, [worker_of(state["west"]), *its])
            others.enter_context(begun(west, site, "node: started for the server"))
            steps.clear()
            until(lambda: trains("west"), "west trains again", WAIT)
            kill_with_all(region, [])
            others.enter_context(begun(edge, site, ""))
            until(lambda: trains("north"), "north trains", WAIT)
            kill(worker_of(state["north"]))
            until(lambda: trains("south"), "south trains", WAIT)
            kill(superlink(environment["PORT"]))
            done = len(entries(run))
            until(lambda: len(entries(run)) > done, "a round ends after the SuperLink is back", WAIT)
            # the server and all that belongs to it, while clients train
            steps.clear()
            until(lambda: any(trains(name) for name in NODES), "somebody trains", WAIT)
            kill_with_all(server, family)
            assert running.wait(timeout=WAIT) == 1, (folder / "run.out").read_text()
            until(lambda: not is_taken(run), "the run's own process ends too", WAIT)
            before = entries(run)
            assert 0 < len(before) < ROUNDS[schedule]
            others.enter_context(kept_running(SERVES, site, "server: listening on"))
            running = started(f"fedlora run --resume {run} --server $SERVER --ca certs/ca.crt", site, "run.out")
            assert running.wait(timeout=WAIT) == 0, (folder / "run.out").read_text()
        finally:
            running.kill()
            running.wait()
    result = json.loads((run / "result.json").read_text())
    assert result["status"] == "completed"
    rounds = result["rounds"]
    assert rounds[: len(before) - 1] == before[:-1]  # the last may not have had its checkpoint
    assert [entry["round"] for entry in rounds] == [*range(1, ROUNDS[schedule] + 1)]
    times = [entry["time"] for entry in rounds]
    assert all(one <= other for one, other in pairwise(times)), "the time of a resumed run goes on"
    counted = [(client, about) for entry in rounds for client, about in entry["clients"].items()]
    assert {client for client, _ in counted} == {"0", "1", "2"}
    asked = [(client, about["asked"]) for client, about in counted]
    assert len({*asked}) == len(asked), "no answer counts twice"
    for number, entry in enumerate(rounds, 1):
        for client, staleness in entry["staleness"].items():
            assert staleness < number
            assert entry["clients"][client]["asked"] <= entry["clients"][client]["answered"] <= entry["time"]
    if schedule != "deadline":
        assert all(len(entry["clients"]) == len(rounds[0]["clients"]) for entry in rounds)
        assert any(staleness for entry in rounds for staleness in entry["staleness"].values())
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in adapter.values())
    shown = called(f"fedlora status {run}", site)
    assert shown.returncode == 0
    assert f"completed: {ROUNDS[schedule]} of {ROUNDS[schedule]} rounds" in shown.stdout
