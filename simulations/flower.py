"""Flower's simulation engine, wrapped: a private SuperLink, `flwr run`, and a failed run is an error.

`flwr run --stream` exits with 0 even when the run fails, and leaves a SuperLink behind that keeps its first
caller's folder and environment. Here each run gets its own SuperLink on free ports, in a neutral folder, and
takes it down again.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from fedlora import __version__
from fedlora.config import Config, Scalar
from fedlora.errors import RunError
from fedlora.events import emit
from fedlora.results import folder_of, stamp, write_json

_log = logging.getLogger("fedlora")
_START_SECONDS = 60.0
_POLL_SECONDS = 1.0
_ASK_SECONDS = 15.0
_APP = """from fedlora.{side}.{module} import app as fedlora_app

app = fedlora_app
"""


def run(config: Config, at_once: int = 1) -> None:
    """Run a federation through `flwr run` on Flower's simulation engine (Ray).

    Args:
        config: the run.
        at_once: clients that train at the same time, each with its own process and base model; they share
            the cores, and a GPU when there is one.

    Raises:
        RunError: Flower did not start, or the run did not complete; the message holds the reason.
    """
    config = _absolute(stamp(config))
    with tempfile.TemporaryDirectory(prefix="fedlora-flower-") as scratch:
        home = Path(scratch)
        bundle = write_bundle(config, home / "app")
        with _superlink(home) as environment:
            _log.info("starting Flower's simulation engine")
            run_id = _submit(bundle, environment, config, at_once)
            try:
                status = _follow(run_id, config, environment, home)
            except KeyboardInterrupt:
                _flwr(["stop", str(run_id), "local"], environment, home)
                _close_record(config, "interrupted")
                raise
            if status != "finished:completed":
                reason = _reason(config, run_id, environment, home)
                _close_record(config, "failed", reason)
                raise RunError(f"Flower run {run_id} ended as {status}: {reason}")


def write_bundle(config: Config, folder: Path) -> Path:
    """A minimal Flower app that holds this run's whole config and imports the installed product."""
    package = folder / "fedlora_run"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "server_app.py").write_text(_APP.format(side="strategies", module="server_app"))
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
{config_table(config)}"""
    )
    return folder


def config_table(config: Config) -> str:
    """The config as TOML lines."""
    return "".join(f"{key} = {_toml(value)}\n" for key, value in config.to_flat().items())


def _toml(value: Scalar) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, bool | str) else repr(value)


def _absolute(config: Config) -> Config:
    """Paths as seen from anywhere: the engine's processes run in another folder."""

    def whole(path: str) -> str:
        return str(Path(path).expanduser().resolve()) if Path(path).expanduser().exists() else path

    return replace(
        config,
        run=replace(config.run, dir=str(Path(config.run.dir).expanduser().resolve())),
        model=replace(config.model, name=whole(config.model.name)),
        data=replace(config.data, source=whole(config.data.source)),
    )


@contextmanager
def _superlink(home: Path) -> Iterator[dict[str, str]]:
    """A SuperLink in simulation mode for one run; yields the environment of `flwr`."""
    port, control = _free_port(), _free_port()
    environment = os.environ | {
        "FLWR_HOME": str(home / "flwr"),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(port),
        "FLWR_LOCAL_CONTROL_API_PORT": str(control),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_DISABLE_DOCKER_CPU_WARNING": "1",
        # Several processes share the cores; threads that spin while they wait would slow each other down tenfold.
        "OMP_WAIT_POLICY": "PASSIVE",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    command = [_program("flower-superlink"), "--insecure", "--simulation", "--isolation", "subprocess"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--control-api-address", f"127.0.0.1:{control}"]
    log = home / "superlink.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=home,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for this process, which then stops the run in order
        )
    try:
        _wait_until_healthy(process, port, log)
        yield environment
    finally:
        _stop_tree(process)


def _wait_until_healthy(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise RunError(f"Flower's SuperLink did not start: {_last_line(log.read_text(errors='replace'))}")


def _stop_tree(process: subprocess.Popen[bytes]) -> None:
    """Stop a process and everything that it started, by pid."""
    try:
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    except psutil.NoSuchProcess:
        return
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.terminate()
    _, alive = psutil.wait_procs(family, timeout=10)
    for member in alive:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(alive, timeout=10)
    process.wait(timeout=10)


def _submit(bundle: Path, environment: dict[str, str], config: Config, at_once: int) -> int:
    cores = os.cpu_count() or 1
    resources = [
        f"num-supernodes={config.federation.clients}",
        f"client-resources-num-cpus={max(1, cores // at_once)}",
        f"init-args-num-cpus={cores}",
    ]
    if config.model.device != "cpu" and _has_gpu():
        resources.append(f"client-resources-num-gpus={1 / at_once}")
    command = ["run", str(bundle), "local", "--format", "json", "--federation-config", " ".join(resources)]
    answer = _flwr(command, environment, bundle.parent)
    try:
        return int(answer["run-id"])
    except (KeyError, TypeError, ValueError):
        raise RunError(f"flwr run did not start: {answer.get('error-message') or answer}") from None


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _follow(run_id: int, config: Config, environment: dict[str, str], cwd: Path) -> str:
    """Wait for the run's end and tell of finished rounds as they appear in result.json; returns the status.

    The record is read every second. Flower is asked now and then, and once the record says that the run has
    ended: each question starts a process that takes a core for seconds.
    """
    seen, asked = 0, 0.0
    while True:
        seen = _tell_rounds(config, seen)
        ended = _result(config).get("status", "running") != "running"
        if ended or time.monotonic() - asked > _ASK_SECONDS:
            answer = _flwr(["ls", "local", "--run-id", str(run_id), "--format", "json"], environment, cwd)
            asked = time.monotonic()
            status = str((answer.get("runs") or [{}])[0].get("status", "unknown"))
            if status.startswith("finished"):
                _tell_rounds(config, seen)
                return status
        time.sleep(_POLL_SECONDS)


def _tell_rounds(config: Config, seen: int) -> int:
    """Emit what result.json holds beyond the first `seen` rounds; returns how many it holds."""
    data = _result(config)
    entries = data.get("rounds", [])
    if entries and not seen and "baseline" in data:
        emit("baseline", metrics=data["baseline"])
    for entry in entries[seen:]:
        emit("round-end", entry=entry)
    return len(entries)


def _result(config: Config) -> dict[str, Any]:
    path = folder_of(config) / "result.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _close_record(config: Config, status: str, error: str = "") -> None:
    """The last word in result.json, where a ServerApp that was killed could not say it."""
    data = _result(config)
    if data.get("status") == "running":
        write_json(folder_of(config) / "result.json", data | {"status": status} | ({"error": error} if error else {}))


def _reason(config: Config, run_id: int, environment: dict[str, str], home: Path) -> str:
    """Why a run failed: its own record says, or else the last line of the log."""
    error = _result(config).get("error")
    if error:
        return str(error)
    shown = _run_flwr(["log", str(run_id), "local", "--show"], environment, home)
    return _last_line(shown.stdout) or _last_line((home / "superlink.log").read_text(errors="replace"))


def _flwr(words: list[str], environment: dict[str, str], cwd: Path) -> dict[str, Any]:
    """One `flwr` command's JSON answer."""
    done = _run_flwr(words, environment, cwd)
    begin = done.stdout.find("{")
    try:
        return json.loads(done.stdout[begin:]) if begin >= 0 else {}
    except json.JSONDecodeError:
        raise RunError(f"flwr {words[0]}: {_last_line(done.stdout + done.stderr)}") from None


def _run_flwr(words: list[str], environment: dict[str, str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [_program("flwr"), *words],
        env=environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def _program(name: str) -> str:
    path = Path(sys.executable).with_name(name)
    if not path.exists():
        raise RunError(f"{path} is missing; install Flower's simulation engine: pip install 'flwr[simulation]'")
    return str(path)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""
