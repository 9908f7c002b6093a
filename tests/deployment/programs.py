"""Commands of real federations in tests: run, kept running, stopped by pid."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedlora.clients.client_app import app as client_app
from fedlora.common.processes import free_port
from fedlora.config import Scalar
from fedlora.deployment import connection
from fedlora.deployment.flower_programs import config_table
from fedlora.results.run_folder import folder_of
from tests.federation import tiny

Site = tuple[Path, dict[str, str]]


def write_run(site: Site, model: Path, run_id: str, **keys: Scalar) -> Path:
    """`<run_id>.toml` of a run of one client for one round, rows of the tiny set; returns the run's folder to be."""
    folder = site[0]
    one = {"federation__clients": 1, "federation__rounds": 1, "federation__wait_timeout": 120.0, "lora__ranks": "2"}
    own = {"evaluate__server": False, "data__partition": "iid", "run__dir": str(folder / "runs"), "run__id": run_id}
    config = tiny(folder, model, **{**one, **own, **keys})
    (folder / f"{run_id}.toml").write_text(config_table(config), encoding="utf-8")
    return folder_of(config)


def make_site(tmp_path: Path) -> Site:
    """A folder with an environment for commands there, on a free port."""
    port = free_port()
    return tmp_path, os.environ | {
        "SERVER_NAME": "fed.example.org",
        "SERVER_IP": "10.0.0.7",
        "SERVER": f"127.0.0.1:{port}",
        "LISTEN": "127.0.0.1",
        "PORT": str(port),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(tmp_path / "never-used"),
        "FEDLORA_ALLOW_FILES": "1",  # the tiny model is a folder
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
    }


def words(command: str, environment: dict[str, str]) -> list[str]:
    """A command line as a shell would split it, variables filled in."""
    return shlex.split(re.sub(r"\$(\w+)", lambda found: environment[found[1]], command))


def called(command: str, site, timeout=600) -> subprocess.CompletedProcess[str]:
    folder, environment = site
    return subprocess.run(
        words(command, environment),
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def started(command: str, site: Site, output: str) -> subprocess.Popen:
    """A command in the background, whose output is appended to a file of the site."""
    folder, environment = site
    with (folder / output).open("a") as file:
        return subprocess.Popen(words(command, environment), cwd=folder, env=environment, stdout=file, stderr=file)


def listens(server: str, ca: Path) -> bool:
    """Whether a server is there."""
    try:
        connection.check_server(server, ca)
    except connection.NotThere:
        return False
    return True


@contextmanager
def begun(command: str, site, says: str):
    """`(process, family, output)` of a command in the background, once it has said that; at the end none is left."""
    folder, environment = site
    output = folder / f"{time.monotonic_ns()}.out"
    with output.open("w") as file:
        process = subprocess.Popen(words(command, environment), cwd=folder, env=environment, stdout=file, stderr=file)
    family = []
    try:
        deadline = time.monotonic() + 120
        while says not in output.read_text():
            assert process.poll() is None, output.read_text()
            assert time.monotonic() < deadline, output.read_text()
            time.sleep(0.2)
        family = psutil.Process(process.pid).children(recursive=True)
        yield process, family, output
    finally:
        if process.poll() is None:
            family = psutil.Process(process.pid).children(recursive=True)
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=60)
        for child in family:
            with suppress(psutil.NoSuchProcess):
                child.kill()
        process.kill()
        process.wait()


@contextmanager
def kept_running(command: str, site, says: str):
    """A command in the background, once it has said that; then told to stop by its pid, and all it started is gone."""
    with begun(command, site, says) as (process, family, output):
        yield
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0, output.read_text()
        assert not [child for child in family if child.is_running()]


def kill_with_all(process: subprocess.Popen, more: list[psutil.Process], seconds: float = 120.0) -> None:
    """Kill a process; all that it had started ends too, and `more`."""
    family = [*more, *psutil.Process(process.pid).children(recursive=True)]
    os.kill(process.pid, signal.SIGKILL)
    _, left = psutil.wait_procs(family, timeout=seconds)
    assert not left, "what a killed process had started ends with it"


def until(found, what: str, seconds: float = 240.0):
    """The first true value of `found()`."""
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.1)
    return value


def answered(folder: Path) -> dict[int, set[int]]:
    """Round -> the clients that were counted."""
    result = json.loads((folder / "result.json").read_text())
    return {entry["round"]: {int(client) for client in entry["clients"]} for entry in result["rounds"]}


def missing(counted: dict[int, set[int]]) -> ClientApp:
    """The product's ClientApp, which fails in those rounds in which a client was not counted."""
    app = ClientApp()

    def answer(message: Message, context: Context) -> Message:
        number = int(message.metadata.group_id)
        if int(context.node_config["partition-id"]) not in counted[number]:
            raise RuntimeError("not there")
        return client_app(message, context)

    app.query()(client_app)
    for phase in ("keys", "shares", "open"):
        app.query(phase)(client_app)
    app.train()(answer)
    return app
