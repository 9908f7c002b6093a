"""A real federation that is stopped, whose worker hangs, and whose server is killed: everybody hears of it."""

import json
import os
import re
import signal
import subprocess
import time
from contextlib import ExitStack

import psutil
import pytest

from fedlora.results.run_folder import is_taken
from tests.deployment.programs import begun, called, kept_running, make_site, words, write_run
from tests.deployment.test_faults import events, kill, until, worker_of
from tests.federation import hears_ctrl_c

pytestmark = [pytest.mark.slow, pytest.mark.nightly, pytest.mark.timeout(1500)]


def test_a_stop_reaches_the_nodes_and_a_worker_that_hangs_is_replaced(tmp_path, tiny_llama):
    site = make_site(tmp_path)
    folder, environment = site

    def start(name: str) -> subprocess.Popen:
        command = words(f"fedlora run {name}.toml --server $SERVER --ca certs/ca.crt", environment)
        with (folder / f"{name}.out").open("w") as output:
            return subprocess.Popen(
                command,
                cwd=folder,
                env=environment,
                stdout=output,
                stderr=output,
                preexec_fn=hears_ctrl_c,  # noqa: PLW1509 - one call
            )

    def said(name: str) -> str:
        return (folder / f"{name}.out").read_text()

    long = {"train__steps": 1_000_000}
    assert called("fedlora certs certs --nodes north", site).returncode == 0
    state = folder / "state" / "north"
    joins = "fedlora node --server $SERVER --ca certs/ca.crt --key certs/north --partition-id 0 --state state/north"
    with ExitStack() as stack:
        serves = "fedlora server --certs certs --port $PORT --state state/server"
        server, family, _ = stack.enter_context(begun(serves, site, "server: listening on"))
        assert called("fedlora register certs/north.pub --server $SERVER --ca certs/ca.crt", site).returncode == 0
        stack.enter_context(kept_running(joins, site, "node: started for the server"))

        # Ctrl-C: the run is interrupted, its lock is free, and the node stops at work
        run = write_run(site, tiny_llama, "stopped", **long)
        running = start("stopped")
        until(lambda: events(state, "client-step"), "the node trains")
        running.send_signal(signal.SIGINT)
        began = time.monotonic()
        assert running.wait(timeout=90) == 130, said("stopped")
        assert json.loads((run / "result.json").read_text())["status"] == "interrupted"
        [left] = until(lambda: events(state, "message-answered", task="train"), "the node has stopped", 60.0)
        assert left["error"].endswith("train was given up: its run has ended")
        assert time.monotonic() - began < 60

        # the next run is not in its way; its worker stops for good in the middle of it, and is replaced
        run = write_run(site, tiny_llama, "hung", train__steps=400)
        running = start("hung")
        until(lambda: events(state, "client-start", round=1)[1:], "the node trains again")
        hung = worker_of(state)
        os.kill(hung.pid, signal.SIGSTOP)
        assert running.wait(timeout=300) == 0, said("hung")
        assert not hung.is_running() or hung.status() == psutil.STATUS_ZOMBIE
        assert list(json.loads((run / "result.json").read_text())["rounds"][0]["clients"]) == ["0"]

        # kill -9 of the server: the command ends, and says so
        run = write_run(site, tiny_llama, "left", **long)
        running = start("left")
        until(lambda: len(events(state, "client-start", round=1)) > 3, "the node trains once more")
        resumed = called(f"fedlora run --resume {run} --server $SERVER --ca certs/ca.crt", site)
        assert resumed.returncode == 1
        assert "still works on this run; wait for it, or stop it (kill " in resumed.stderr
        kill(psutil.Process(server.pid))
        began = time.monotonic()
        assert running.wait(timeout=240) == 1, said("left")
        assert re.search("has not answered for|does not answer, and|ended as", said("left"))
        assert f"fedlora run --resume {run}" in said("left")
        _, alive = psutil.wait_procs(family, timeout=60)
        assert not alive, "all that the server had started ends with it"
        until(lambda: not is_taken(run), "the run's own process too", 90)
        assert time.monotonic() - began < 240
