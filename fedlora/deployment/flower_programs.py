"""Runs Flower's own programs in a neutral folder; submits runs through `flwr`, and follows them to their end.

`flwr run --stream` exits with 0 even if the run fails, so that this module asks for the run's status itself.
"""

from __future__ import annotations

import json
import logging
import os
import re
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedlora import __version__
from fedlora.common.errors import RunError
from fedlora.common.events import emit
from fedlora.common.files import write_json
from fedlora.common.processes import share_cores
from fedlora.config import Config, Scalar
from fedlora.results.run_folder import folder_of, is_taken

_log = logging.getLogger("fedlora")
_START_SECONDS = 60.0
_POLL_SECONDS = 1.0
_ASK_SECONDS = 15.0
_LOST_SECONDS = 90.0  # longest time without an answer; a SuperLink that died is back within half a minute
_LEAVE_SECONDS = 45.0  # time for a stopped run to end
_APP = """from fedlora.{side}.{module} import app as fedlora_app

app = fedlora_app
"""


@dataclass(frozen=True)
class Connection:
    """A connection of `flwr` to a SuperLink.

    Args:
        name: name of the connection in `$FLWR_HOME/config.toml`; "local" is the SuperLink in the environment variables.
        environment: environment variables of every `flwr` process.
        folder: working folder of these processes.
        address: address of the server, for messages.
    """

    name: str
    environment: dict[str, str]
    folder: Path
    address: str = "this machine"

    def run(self, *words: str, timeout: float = 120.0) -> subprocess.CompletedProcess[str]:
        """Run one `flwr` command. If it takes longer than the timeout, it is ended, and counts as failed."""
        command = [program("flwr"), *words]
        try:
            return subprocess.run(
                command,
                env=self.environment,
                cwd=self.folder,
                capture_output=True,
                text=True,
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return subprocess.CompletedProcess(command, 1, "", f"no answer within {timeout:.0f} s")

    def ask(self, *words: str, timeout: float = 120.0) -> dict[str, Any]:
        """The JSON answer of one `flwr` command.

        Raises:
            RunError: the answer is not valid JSON.
        """
        done = self.run(*words, timeout=timeout)
        begin = done.stdout.find("{")
        try:
            return json.loads(done.stdout[begin:]) if begin >= 0 else {"error-message": reason_of(done.stderr)}
        except json.JSONDecodeError:
            raise RunError(f"flwr {words[0]}: {last_line(done.stdout + done.stderr)}") from None


def environment(home: Path) -> dict[str, str]:
    """Environment variables for Flower's programs: own state folder, no telemetry, no installation at run time."""
    share_cores()  # several processes compute by turns
    return os.environ | {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",  # seconds; each message waits for it
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }


def program(name: str) -> str:
    """The path of one of Flower's programs, in the folder of this Python."""
    path = Path(sys.executable).with_name(name)
    if not path.exists():
        raise RunError(f"{path} is missing; install Flower's simulation engine: pip install 'flwr[simulation]'")
    return str(path)


def wait_until_healthy(
    process: subprocess.Popen[bytes], url: str, log: Path, context: ssl.SSLContext | None = None
) -> None:
    """Wait until a SuperLink answers.

    Raises:
        RunError: the SuperLink ended, or did not answer in time; the message has the last line of its log.
    """
    deadline = time.monotonic() + _START_SECONDS
    reason = ""
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=1, context=context):
                return
        except (urllib.error.URLError, OSError) as error:
            reason = f" ({error})"
            time.sleep(0.2)
    raise RunError(f"Flower's SuperLink did not start: {reason_of(log.read_text(errors='replace'))}{reason}")


def write_bundle(config: Config, folder: Path, server_app: str = "server_app") -> Path:
    """Write a small Flower app with this run's whole config, which imports the installed FedLoRA; return its folder.

    Args:
        config: the run's configuration.
        folder: where the app is written.
        server_app: the module of `fedlora.strategies` that has the ServerApp.
    """
    package = folder / "fedlora_run"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "server_app.py").write_text(_APP.format(side="strategies", module=server_app))
    (package / "client_app.py").write_text(_APP.format(side="clients", module="client_app"))
    (folder / "pyproject.toml").write_text(
        f"""[project]
name = "fedlora-run"
version = "{__version__}"
dependencies = []

[tool.flwr.app]
publisher = "fedlora"
fab-include = ["fedlora_run/*.py"]

[tool.flwr.app.components]
serverapp = "fedlora_run.server_app:app"
clientapp = "fedlora_run.client_app:app"

[tool.flwr.app.config]
{config_table(config)}""",
        encoding="utf-8",
    )
    return folder


def config_table(config: Config) -> str:
    """The config as TOML lines."""
    return "".join(f"{key} = {toml(value)}\n" for key, value in config.to_flat().items())


def toml(value: Scalar) -> str:
    """A value as TOML."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, bool | str) else repr(value)


def absolute(config: Config) -> Config:
    """The config with absolute paths, since Flower's processes run in another folder."""

    def whole(path: str) -> str:
        return str(Path(path).expanduser().resolve()) if Path(path).expanduser().exists() else path

    return replace(
        config,
        run=replace(config.run, dir=str(Path(config.run.dir).expanduser().resolve())),
        model=replace(config.model, name=whole(config.model.name)),
        data=replace(config.data, source=whole(config.data.source)),
    )


def carry_out(config: Config, bundle: Path, connection: Connection, log: Path | None, resources: str = "") -> None:
    """Submit a run, and follow it to its end; Ctrl-C stops the run.

    Args:
        config: the run's configuration, with a `run.id`.
        bundle: folder that `write_bundle` wrote.
        connection: connection to the SuperLink.
        log: the SuperLink's log file, in which the reason of a failure may stand; None if it is on another machine.
        resources: the federation config for `flwr run`.

    Raises:
        RunError: the run did not start, or did not complete.
    """
    before = _result(config) if config.run.resume else {}
    run_id = submit(bundle, connection, resources)
    try:
        status = _follow(run_id, config, connection, before)
    except KeyboardInterrupt:
        connection.ask("stop", str(run_id), connection.name)
        _wait_until_left(config)
        _close_record(config, "interrupted")
        raise
    if status != "finished:completed":
        reason = _reason(config, run_id, connection, log, before)
        _close_record(config, "failed", reason)
        raise RunError(f"Flower run {run_id} ended as {status}: {reason}")


def submit(bundle: Path, connection: Connection, resources: str = "") -> int:
    """Submit a run; return Flower's number of it.

    Args:
        bundle: folder that `write_bundle` wrote.
        connection: connection to the SuperLink.
        resources: the federation config for `flwr run`.

    Raises:
        RunError: the run was not accepted.
    """
    options = ["--federation-config", resources] if resources else []
    answer = connection.ask("run", str(bundle), connection.name, "--format", "json", *options)
    try:
        return int(answer["run-id"])
    except (KeyError, TypeError, ValueError):
        said = reason_of(str(answer.get("error-message") or answer))
        hint = "; its server.log says why: a full disk, for instance" if "500" in said else ""
        raise RunError(f"the server at {connection.address} did not accept the run: {said}{hint}") from None


def _follow(run_id: int, config: Config, connection: Connection, before: dict[str, Any]) -> str:
    """Emit the events of rounds as they appear in result.json; return the run's status at its end.

    The record is read every second. Flower is asked only from time to time, and when the record says that the run has
    ended, since each question starts a process that occupies a core for seconds.

    Raises:
        RunError: the server has not answered for so long that its SuperLink will not come back by itself.
    """
    seen, asked, answered = 0, 0.0, time.monotonic()
    while True:
        data = _result(config)
        data = {} if data == before else data  # not the record of the earlier part of a resumed run
        seen = _tell_rounds(data, seen)
        ended = data.get("status", "running") != "running"
        if ended or time.monotonic() - asked > _ASK_SECONDS:
            answer = connection.ask("ls", connection.name, "--run-id", str(run_id), "--format", "json", timeout=30.0)
            asked = time.monotonic()
            runs = answer.get("runs")
            status = str((runs or [{}])[0].get("status", "unknown"))
            if status.startswith("finished"):
                _tell_rounds(_result(config), seen)
                return status
            if runs:
                answered = asked
            elif ended and asked - answered > _ASK_SECONDS:  # without Flower's answer, the record decides
                return f"finished:{data['status']}"
            elif data and asked - answered > _ASK_SECONDS and not is_taken(folder_of(config)):
                raise RunError(
                    f"the server at {connection.address} does not answer, and the run's process has ended with it; "
                    f"when it is back, continue with: fedlora run --resume {folder_of(config)} --server …"
                )
            elif asked - answered > _LOST_SECONDS:
                said = reason_of(str(answer.get("error-message") or "no answer"))
                raise RunError(
                    f"the server at {connection.address} has not answered for {asked - answered:.0f} s ({said}), and "
                    "this command waits no longer; when it is back, continue with: fedlora run --resume "
                    f"{folder_of(config)} --server …"
                )
        time.sleep(_POLL_SECONDS)


def _wait_until_left(config: Config) -> None:
    """Wait until the process of a stopped run has written its record, if it is on this machine."""
    deadline = time.monotonic() + _LEAVE_SECONDS
    while is_taken(folder_of(config)) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)


def _tell_rounds(data: dict[str, Any], seen: int) -> int:
    """Emit the events of a record's rounds after the first `seen`; return the number of rounds in the record."""
    entries = data.get("rounds", [])
    if entries and not seen and "baseline" in data:
        emit("baseline", metrics=data["baseline"], head=data.get("head", ""))
    for entry in entries[seen:]:
        emit("round-end", entry=entry)
    return max(seen, len(entries))


def _result(config: Config) -> dict[str, Any]:
    path = folder_of(config) / "result.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _close_record(config: Config, status: str, error: str = "") -> None:
    """Write the final status to result.json, if a ServerApp that was killed could not write it."""
    data = _result(config)
    if data.get("status") == "running":
        write_json(folder_of(config) / "result.json", data | {"status": status} | ({"error": error} if error else {}))


def _reason(config: Config, run_id: int, connection: Connection, log: Path | None, before: dict[str, Any]) -> str:
    """The reason why a run failed, from its record, or else from the last line of the log.

    Args:
        config: the run's configuration.
        run_id: Flower's number of the run.
        connection: connection to the SuperLink.
        log: the SuperLink's log file; None if it is on another machine.
        before: the record before this run was submitted; if a run is resumed, it may have an earlier error.
    """
    data = _result(config)
    if "error" in data and data != before:
        return str(data["error"])
    if data.get("status") == "interrupted" and data != before:
        where = folder_of(config)
        return f"its server stopped it, or ended itself; continue with: fedlora run --resume {where} --server …"
    shown = connection.run("log", str(run_id), connection.name, "--show")
    last = last_line(shown.stdout) or (last_line(log.read_text(errors="replace")) if log else "no reason was logged")
    if data.get("status") == "running":
        return f"its ServerApp's process ended without a reason (killed, or out of memory); the last line was: {last}"
    return last


def last_line(text: str) -> str:
    """The last line of a text that is not empty."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def reason_of(text: str) -> str:
    """The error in the output of one of Flower's programs, as one line; without an error, its last line."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    errors = re.findall(r"(?:Exit Code: \d+|ERROR \[uvicorn\.error\])\s+(.+(?:\n(?!The SuperNode|\n).+)?)", text)
    found = errors[-1] if errors else last_line(text.replace("│", "").split("\n╰")[0])
    return " ".join(found.split())
