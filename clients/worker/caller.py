"""The ClientApp's side of the resident worker: starts it where none is healthy, hands over, tells progress."""

from __future__ import annotations

import logging
import math
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import grpc
from filelock import FileLock
from flwr.app import Context, Error, RecordDict
from flwr.common.constant import ErrorCode
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fedlora.common import processes
from fedlora.common.events import emit
from fedlora.common.rotation import rotate

from ..answering.vigil import Vigil
from . import envelope

_START_SECONDS = 60.0
_HEALTH_SECONDS = 20.0  # a worker that computes lets go of Python's lock many times a second
_LOOK_SECONDS, _MISSED = (
    5.0,
    2,
)  # a worker at work is looked at so often; that many times without a word, it is replaced
_QUEUE_SECONDS = 120.0  # until it begins with a message: what it did before is dropped by then
_STALL_SECONDS = 1800.0  # without a step, where the node's config does not say otherwise
_ATTEMPTS = 2
_started: list[subprocess.Popen[bytes]] = []  # a Popen that is let go of before its process ends complains
_log = logging.getLogger("fedlora")


def ask(socket: str, task: str, content: RecordDict, context: Context, vigil: Vigil) -> RecordDict | Error:
    """The worker's answer; a worker that dies at work, or hangs, is replaced once.

    Args:
        socket: path of its Unix socket, from the node's config.
        task: "describe", "train" or "evaluate".
        content: the message's.
        context: of this run on this node.
        vigil: over this message.

    Raises:
        Over: nobody waits for the answer any more.
    """
    path = Path(socket)
    stall = float(context.node_config.get("worker-stall", _STALL_SECONDS))
    request = envelope.pack_request(task, content, context)
    reasons: list[str] = []
    for _ in range(_ATTEMPTS):
        try:
            vigil.check()
            _make_sure(path, context.node_config)
            return _call(path, request, vigil, stall)
        except grpc.RpcError as error:
            reasons.append(str(error.details() if isinstance(error, grpc.Call) else error))
        except (_NotStarted, _PastHope) as error:
            reasons.append(str(error))
        _log.warning("worker: ended during %s: %s", task, reasons[-1])
    return Error(
        ErrorCode.CLIENT_APP_RAISED_EXCEPTION,
        f"the node's worker ended {_ATTEMPTS} times during {task} ({reasons[-1]}); its worker.log says more, and a "
        "worker that the system killed needs more memory",
    )


class _NotStarted(Exception):
    """A worker was started and does not answer."""


class _PastHope(Exception):
    """A worker that was there and will not answer; it was killed."""


def _call(socket: Path, request: bytes, vigil: Vigil, stall_seconds: float) -> RecordDict | Error:
    with _channel(socket) as channel:
        call = channel.unary_stream(f"/{envelope.SERVICE}/{envelope.METHOD}")(request)
        watch = _Watch(socket, call, vigil, stall_seconds)
        try:
            for frame in call:
                match envelope.unpack(frame):
                    case (envelope.BEGUN, _):
                        watch.begun()
                    case (kind, facts):
                        watch.heard()
                        emit(kind, **facts)
                    case answer:
                        return answer
        except grpc.RpcError:
            vigil.check()
            if watch.why:
                raise _PastHope(watch.why) from None
            raise
        finally:
            watch.end()
    raise _NotStarted("it gave no answer")


class _Watch:
    """Looks after one call: ends it when nobody waits for its answer, and the worker too when that is past hope.

    Attributes:
        why: the worker was past hope; empty while it is not.
    """

    def __init__(self, socket: Path, call: grpc.Call, vigil: Vigil, stall_seconds: float) -> None:
        self.why = ""
        self._socket, self._call, self._vigil, self._stall = socket, call, vigil, stall_seconds
        # How long for what; for nothing while it loads its model, which tells of no steps.
        self._limit = (_QUEUE_SECONDS, f"it did not begin with the message within {_QUEUE_SECONDS:.0f} s")
        self._since = time.monotonic()
        self._done = threading.Event()
        threading.Thread(target=self._look, daemon=True).start()

    def begun(self) -> None:
        """The worker is at this message."""
        self._limit = (math.inf, "")

    def heard(self) -> None:
        """It tells of its progress."""
        self._since = time.monotonic()
        self._limit = (self._stall, f"no step for {self._stall:.0f} s (node config: worker-stall)")

    def end(self) -> None:
        """Nothing is to be looked after any more."""
        self._done.set()

    def _look(self) -> None:
        looked, missed = time.monotonic(), 0
        while not self._done.wait(0.2):
            now = time.monotonic()
            if self._vigil.over:
                self._call.cancel()
                return
            if now - looked > _LOOK_SECONDS:
                missed = 0 if _is_healthy(self._socket) else missed + 1
                looked = time.monotonic()
            seconds, what = self._limit
            if missed == _MISSED:
                self.why = "it was stopped or hung, and said nothing when it was asked"
            elif now - self._since > seconds:
                self.why = f"it hung: {what}"
            if self.why and not self._done.is_set():
                processes.stop_recorded(self._socket.with_name("worker.pid"), "worker", kill=True)
                self._call.cancel()
                return


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
    rotate(folder / "worker.log")
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
