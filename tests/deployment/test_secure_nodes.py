"""Secure sums over real nodes: one is killed in each phase of a round, and the sum is that of the others."""

import signal
import subprocess
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from fedlora.adapters.algebra import norm, stack
from fedlora.deployment.flower_programs import config_table
from fedlora.models.peft_files import read_adapter
from fedlora.results import journal
from fedlora.results.run_folder import folder_of
from fedlora.simulations import run as simulation
from tests.deployment.programs import answered, begun, called, kept_running, make_site, missing, until, words
from tests.federation import tiny

pytestmark = [pytest.mark.slow, pytest.mark.nightly, pytest.mark.timeout(3600)]
PEOPLE = 5  # each has four neighbours, of whom three must open: one may be gone
# The last thing that node 0 did before it is killed, so that it is missing in the next phase.
STRUCK = (("keys", 2), ("shares", 3), ("train", 4))  # the number of its rounds, of which it misses some
ROUNDS = 9


def node(person: int) -> str:
    return (
        f"fedlora node --server $SERVER --ca certs/ca.crt --key certs/n{person} --partition-id {person} "
        f"--state state/n{person}"
    )


def has_done(state: Path, task: str, number: int) -> bool:
    """Whether a node has answered this phase of that round, by its own events."""
    path, rounds = state / journal.NAME, 0
    for event in journal.read(path) if path.exists() else ():
        if event["event"] == "message-answered" and "error" not in event:
            rounds += event["task"] == "keys"
            if event["task"] == task and rounds >= number:
                return True
    return False


def test_a_node_killed_in_each_phase_is_missing_from_that_sum_alone(tmp_path, tiny_llama):
    site = make_site(tmp_path)
    folder, environment = site
    config = tiny(
        tmp_path,
        tiny_llama,
        strategy__name="fedavg-zeropad",
        lora__ranks="4,2,1,1,2",
        federation__clients=PEOPLE,
        federation__min_clients=3,
        federation__rounds=ROUNDS,
        federation__round_timeout=600.0,
        train__steps=40,
        train__lr=1e-3,
        data__partition="iid",
        run__dir=str(tmp_path / "runs"),
        privacy__secure_sum=True,
    )
    (folder / "run.toml").write_text(config_table(config), encoding="utf-8")
    run, state = folder_of(config), folder / "state" / "n0"
    names = [f"n{person}" for person in range(PEOPLE)]
    assert called(f"fedlora certs certs --nodes {','.join(names)}", site).returncode == 0
    with (
        ExitStack() as others,
        kept_running("fedlora server --certs certs --port $PORT --state state/server", site, "server: listening on"),
    ):
        keys = " ".join(f"certs/{name}.pub" for name in names)
        assert called(f"fedlora register {keys} --server $SERVER --ca certs/ca.crt", site).returncode == 0
        for person in range(1, PEOPLE):
            others.enter_context(kept_running(node(person), site, "node: started for the server"))
        doomed, family, _ = others.enter_context(begun(node(0), site, "node: started for the server"))
        command = words("fedlora run run.toml --server $SERVER --ca certs/ca.crt", environment)
        with (folder / "run.out").open("w") as output:
            running = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=output)
        try:
            for task, number in STRUCK:
                until(
                    lambda task=task, number=number: has_done(state, task, number),
                    f"node 0 answers {task} of round {number}",
                    seconds=600.0,
                )
                psutil.Process(doomed.pid).send_signal(signal.SIGKILL)
                psutil.wait_procs(family, timeout=60)
                doomed, family, _ = others.enter_context(begun(node(0), site, "node: started for the server"))
            assert running.wait(timeout=900) == 0, (folder / "run.out").read_text()
        finally:
            running.kill()
            running.wait()
    there = answered(run)
    assert there[1] == set(range(PEOPLE))
    assert all({1, 2, 3, 4} <= clients for clients in there.values())
    assert any(0 not in clients for clients in there.values()), "a node that is killed before it sends is missing"
    again = replace(config, run=replace(config.run, id="again"))
    simulation.in_process(again, client_app=missing(there))
    one, two = (read_adapter(each / "adapter") for each in (run, folder_of(again)))
    for name, factors in one.lora.items():
        assert norm(stack([factors, two.lora[name]], [1.0, -1.0])) <= 1e-4 * norm(factors)
