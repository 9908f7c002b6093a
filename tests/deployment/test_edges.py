"""Flower's real programs: a server, two edges with TLS and keys of their own, and two nodes below each."""

import json
import os
import re
import signal
from contextlib import ExitStack
from dataclasses import replace

import pytest

from fedlora.common.processes import free_port
from fedlora.deployment import certificates, nodes
from fedlora.deployment.flower_programs import config_table
from fedlora.results.run_folder import folder_of, is_taken
from fedlora.simulations import run as simulation
from tests.deployment.programs import (
    answered,
    begun,
    kept_running,
    kill_with_all,
    listens,
    make_site,
    missing,
    started,
    until,
)
from tests.deployment.test_faults import events
from tests.device import assert_same
from tests.federation import tiny
from tests.simulations.engines.test_local import saved_adapter

pytestmark = [pytest.mark.slow, pytest.mark.nightly, pytest.mark.timeout(3600)]
REGIONS = {"europe": [0, 1], "asia": [2, 3]}
ROUNDS = 5
WAIT = 900.0  # seconds


def test_a_run_through_edges_that_are_killed_is_the_run_of_those_it_counted(tmp_path, tiny_llama):
    site = make_site(tmp_path)
    folder, environment = site
    config = tiny(
        tmp_path,
        tiny_llama,
        strategy__name="flora",
        federation__min_clients=3,  # so that the round in which an edge dies waits for it
        federation__rounds=ROUNDS,
        federation__round_timeout=900.0,
        federation__wait_timeout=600.0,
        train__steps=60,
        train__lr=1e-3,
        data__partition="iid",
        evaluate__server=False,
        run__dir=str(tmp_path / "runs"),
    )
    (folder / "run.toml").write_text(config_table(config), encoding="utf-8")
    run = folder_of(config)
    certificates.make(folder / "certs", nodes=[*REGIONS])
    for name, clients in REGIONS.items():
        certificates.make(folder / name, nodes=[f"n{client}" for client in clients])
    ports = {name: free_port() for name in REGIONS}
    servers = {name: folder / "state" / name / "server" for name in ("", *REGIONS)}

    def edge(name: str) -> str:
        above = f"--server $SERVER --ca certs/ca.crt --key certs/{name} --clients 2"
        return f"fedlora edge {above} --certs {name} --port {ports[name]} --state state/{name}"

    def node(name: str, client: int) -> str:
        joins = f"fedlora node --server 127.0.0.1:{ports[name]} --ca {name}/ca.crt --key {name}/n{client}"
        return f"{joins} --partition-id {client} --state state/n{client}"

    serves = "fedlora server --certs certs --port $PORT --state state/server"
    with ExitStack() as others:
        root, roots, _ = others.enter_context(begun(serves, site, "server: listening on"))
        killable = {name: others.enter_context(begun(edge(name), site, "")) for name in REGIONS}
        keys = [folder / "certs" / f"{name}.pub" for name in REGIONS]
        nodes.register(keys, environment["SERVER"], folder / "certs" / "ca.crt")
        for name, clients in REGIONS.items():
            there, ca = f"127.0.0.1:{ports[name]}", folder / name / "ca.crt"
            until(lambda there=there, ca=ca: listens(there, ca), f"{name} listens", WAIT)
            nodes.register([folder / name / f"n{client}.pub" for client in clients], there, ca)
            killable |= {client: others.enter_context(begun(node(name, client), site, "")) for client in clients}
        running = started("fedlora run run.toml --server $SERVER --ca certs/ca.crt", site, "run.out")
        try:
            # a node of a region, in the middle of its training
            until(lambda: events(folder / "state" / "n1", "client-step", round=2), "client 1 trains in round 2", WAIT)
            os.kill(killable[1][0].pid, signal.SIGKILL)
            others.enter_context(begun(node("europe", 1), site, ""))
            # an edge, while its region trains, with all that belongs to it
            until(lambda: events(folder / "state" / "n3", "client-step", round=3), "client 3 trains in round 3", WAIT)
            kill_with_all(killable["asia"][0], [])
            others.enter_context(begun(edge("asia"), site, ""))
            # the root's server, with the run and all else that belongs to it
            until(lambda: events(folder / "state" / "n0", "client-step", round=4), "client 0 trains in round 4", WAIT)
            kill_with_all(root, roots)
            assert running.wait(timeout=WAIT) == 1, (folder / "run.out").read_text()
            until(lambda: not is_taken(run), "the run's own process ends too", WAIT)
            others.enter_context(kept_running(serves, site, "server: listening on"))
            running = started(f"fedlora run --resume {run} --server $SERVER --ca certs/ca.crt", site, "run.out")
            assert running.wait(timeout=WAIT) == 0, (folder / "run.out").read_text()
        finally:
            running.kill()
            running.wait()
    result = json.loads((run / "result.json").read_text())
    assert result["status"] == "completed"
    counted = answered(run)
    assert counted[1] == {0, 1, 2, 3}
    assert counted[2] == {0, 2, 3}, "a node of a region that dies is one client that died"
    assert counted[3] >= {0, 2, 3}, "an edge that dies is asked again when it is back"
    assert counted[4] == counted[5] == {0, 1, 2, 3}, "edges come back to a server that was started anew"
    failures = {entry["round"]: entry["failures"] for entry in result["rounds"]}
    assert re.match("client 1 (failed|did not answer)", failures[2]["1"])
    assert {about["client-id"]: about["edges"] for about in result["clients"]} == {
        client: [name] for name, clients in REGIONS.items() for client in clients
    }
    for entry in result["rounds"]:
        crossed = [border["upload-bytes"] for border in entry["borders"].values()]
        assert sum(crossed) == entry["upload-bytes"] > 0
    keys = {name: json.loads((state / "client-keys.json").read_text()) for name, state in servers.items()}
    assert keys == {
        "europe": {"0": "n0", "1": "n1"},
        "asia": {"2": "n2", "3": "n3"},
        "": {str(client): name for name, clients in REGIONS.items() for client in clients},
    }
    # The same rounds in one process, with the same clients away: equal to the last bit.
    again = replace(config, run=replace(config.run, id="again"))
    simulation.in_process(again, client_app=missing(counted))
    assert_same(saved_adapter(run), saved_adapter(folder_of(again)))
