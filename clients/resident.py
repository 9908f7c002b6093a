"""The ClientApp's side of the resident worker: starts it where none is healthy, hands over, tells progress."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import grpc
from filelock import FileLock
from flwr.app import Context, Error, RecordDict
from flwr.common.constant import ErrorCode
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fedlora import processes
from fedlora.events import emit

from . import envelope

_START_SECONDS = 60.0
_HEALTH_SECONDS = 20.0  # a worker that computes lets go of Python's lock many times a second
_ATTEMPTS = 2
_started: list[subprocess.Popen[bytes]] = []  # a Popen that is let go of before its process ends complains
_log = logging.getLogger("fedlora")


def ask(socket: str, task: str, content: RecordDict, context: Context) -> RecordDict | Error:
    """The worker's answer; a worker that dies at work is started again once.

    Args:
        socket: path of its Unix socket, from the node's config.
        task: "describe", "train" or "evaluate".
        content: the message's.
        context: of this run on this node.
    """
    path = Path(socket)
    request = envelope.pack_request(task, content, context)
    reasons: list[str] = []
    for _ in range(_ATTEMPTS):
        try:
            _make_sure(path, context.node_config)
            return _call(path, request)
        except grpc.RpcError as error:
            reasons.append(str(error.details() if isinstance(error, grpc.Call) else error))
        except _NotStarted as error:
            reasons.append(str(error))
        _log.warning("worker: ended during %s: %s", task, reasons[-1])
    return Error(
        ErrorCode.CLIENT_APP_RAISED_EXCEPTION,
        f"the node's worker ended {_ATTEMPTS} times during {task} ({reasons[-1]}); its worker.log says more, and a "
        "worker that the system killed needs more memory",
    )


class _NotStarted(Exception):
    """A worker was started and does not answer."""


def _call(socket: Path, request: bytes) -> RecordDict | Error:
    with _channel(socket) as channel:
        call = channel.unary_stream(f"/{envelope.SERVICE}/{envelope.METHOD}")
        for frame in call(request):
            match envelope.unpack(frame):
                case (kind, facts):
                    emit(kind, **facts)
                case answer:
                    return answer
    raise _NotStarted("it gave no answer")


def _make_sure(socket: Path, settings: Mapping[str, object]) -> None:
    """A healthy worker listens on the socket; ClientApps that come at the same time start one."""
    if _is_healthy(socket):
        return
    with FileLock(socket.with_name("start.lock")):
        if _is_healthy(socket):
            return
        processes.stop_recorded(socket.with_name("worker.pid"), "worker")
        _start(socket, settings)


def _start(socket: Path, settings: Mapping[str, object]) -> None:
    command = [sys.executable, "-m", "fedlora.cli", "worker", "--socket", str(socket)]
    if "node-pid" in settings:
        command += ["--node-pid", str(settings["node-pid"])]
    if "worker-idle" in settings:
        command += ["--idle", str(settings["worker-idle"])]
    folder = Path(str(settings.get("state", socket.parent)))
    with (folder / "worker.log").open("ab") as log:
        process = subprocess.Popen(
            command,
            cwd=socket.parent,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # it outlives this process, and goes with the node
        )
    _started.append(process)
    emit("worker-start", pid=process.pid)
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise _NotStarted(f"it ended at once with exit code {process.returncode}")
        if _is_healthy(socket):
            return
        time.sleep(0.05)
    process.kill()
    raise _NotStarted(f"it did not answer within {_START_SECONDS:.0f} s")


def _is_healthy(socket: Path) -> bool:
    if not socket.exists():
        return False
    with _channel(socket) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check  # pyright: ignore[reportAttributeAccessIssue] - made in __init__
        try:
            answer = check(health_pb2.HealthCheckRequest(service=envelope.SERVICE), timeout=_HEALTH_SECONDS)
        except grpc.RpcError:
            return False
    return answer.status == health_pb2.HealthCheckResponse.SERVING


def _channel(socket: Path) -> grpc.Channel:
    return grpc.insecure_channel(f"unix:{socket}", options=envelope.GRPC_OPTIONS)
