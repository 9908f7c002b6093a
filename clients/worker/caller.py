"""The ClientApp's side of the resident worker: starts a worker if there is none, gives it messages, and watches it."""

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

from fedlora.common import processes
from fedlora.common.errors import FedLoraError
from fedlora.common.events import emit
from fedlora.common.rotation import rotate
from fedlora.deployment import envelope, resident
from fedlora.deployment.resident import is_healthy

from ..answering.vigil import Vigil
from . import region

_START_SECONDS = 60.0
# A working worker is asked for a sign of life every 5 s; it is replaced after two questions without an answer.
_LOOK_SECONDS, _MISSED = 5.0, 2
_QUEUE_SECONDS = 120.0  # until the worker begins with a message, or works on another that is waited for
_STALL_SECONDS = 1800.0  # longest time without a step, unless the node's config sets another
_ATTEMPTS = 2
_started: list[subprocess.Popen[bytes]] = []  # kept, since a Popen that is deleted before its process ends warns
_log = logging.getLogger("fedlora")


def ask(socket: str, task: str, content: RecordDict, context: Context, vigil: Vigil) -> RecordDict | Error:
    """The worker's answer to a message. A worker that dies or hangs meanwhile is replaced once.

    Args:
        socket: path of the worker's Unix socket, from the node's config.
        task: a name in `single._TASKS`, such as "train".
        content: the message's content.
        context: Flower's context of this run on this node.
        vigil: the vigil over this message.

    Raises:
        Over: the server no longer waits for the answer.
    """
    path = Path(socket)
    stall = float(context.node_config.get("worker-stall", _STALL_SECONDS))
    request = envelope.pack_request(task, content, context)
    reasons: list[str] = []
    for _ in range(_ATTEMPTS):
        try:
            vigil.check()
            if region.is_edge(context):
                region.make_sure(path, context)
            else:
                _make_sure(path, context.node_config)
            return _call(path, request, vigil, stall)
        except grpc.RpcError as error:
            reasons.append(str(error.details() if isinstance(error, grpc.Call) else error))
        except (_NotStarted, _PastHope, FedLoraError) as error:
            reasons.append(str(error))
        _log.warning("worker: ended during %s: %s", task, reasons[-1])
    if region.is_edge(context):
        # as a node that is not there, and so to be asked again
        return Error(ErrorCode.NODE_UNAVAILABLE, f"the edge has no run in its region: {reasons[-1]}")
    return Error(
        ErrorCode.CLIENT_APP_RAISED_EXCEPTION,
        f"the node's worker ended {_ATTEMPTS} times during {task} ({reasons[-1]}); its worker.log says more; if the "
        "system killed it, it needs more memory",
    )


class _NotStarted(Exception):
    """A worker was started but does not answer."""


class _PastHope(Exception):
    """A running worker no longer answers, and was killed."""


def _call(socket: Path, request: bytes, vigil: Vigil, stall_seconds: float) -> RecordDict | Error:
    with resident.channel(socket) as channel:
        call = channel.unary_stream(f"/{envelope.SERVICE}/{envelope.METHOD}")(request)
        watch = _Watch(socket, call, vigil, stall_seconds)
        try:
            for frame in call:
                match envelope.unpack(frame):
                    case (envelope.BEGUN, _):
                        watch.begun()
                    case (envelope.WAITING, _):
                        watch.waiting()
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
    """Watches one call. It ends the call if the server no longer waits, and kills a worker that hangs.

    Attributes:
        why: the reason why the worker was killed; empty if it was not.
    """

    def __init__(self, socket: Path, call: grpc.Call, vigil: Vigil, stall_seconds: float) -> None:
        self.why = ""
        self._socket, self._call, self._vigil, self._stall = socket, call, vigil, stall_seconds
        # The longest wait and what is waited for; there is no limit while the worker loads its model, without steps.
        self._limit = (_QUEUE_SECONDS, f"it did not begin with the message within {_QUEUE_SECONDS:.0f} s")
        self._since = time.monotonic()
        self._done = threading.Event()
        threading.Thread(target=self._look, daemon=True).start()

    def waiting(self) -> None:
        """The worker works on another message, whose own caller watches it."""
        self._since = time.monotonic()

    def begun(self) -> None:
        """The worker has begun with this message."""
        self._limit = (math.inf, "")

    def heard(self) -> None:
        """The worker has reported progress."""
        self._since = time.monotonic()
        self._limit = (self._stall, f"no step for {self._stall:.0f} s (node config: worker-stall)")

    def end(self) -> None:
        """Stop watching."""
        self._done.set()

    def _look(self) -> None:
        looked, missed = time.monotonic(), 0
        while not self._done.wait(0.2):
            now = time.monotonic()
            if self._vigil.over:
                self._call.cancel()
                return
            if now - looked > _LOOK_SECONDS:
                missed = 0 if is_healthy(self._socket) else missed + 1
                looked = time.monotonic()
            seconds, what = self._limit
            if missed == _MISSED:
                self.why = "it was stopped or hung, and did not answer when it was asked"
            elif now - self._since > seconds:
                self.why = f"it hung: {what}"
            if self.why and not self._done.is_set():
                processes.stop_recorded(self._socket.with_name("worker.pid"), "worker", kill=True)
                self._call.cancel()
                return


def _make_sure(socket: Path, settings: Mapping[str, object]) -> None:
    """Start a worker unless a healthy one listens on the socket; ClientApps that call this together start only one."""
    if is_healthy(socket):
        return
    with FileLock(socket.with_name("start.lock")):
        if is_healthy(socket):
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
            start_new_session=True,  # the worker outlives this process, and ends with the node
        )
    _started.append(process)
    emit("worker-start", pid=process.pid)
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise _NotStarted(f"it ended at once with exit code {process.returncode}")
        if is_healthy(socket):
            return
        time.sleep(0.05)
    process.kill()
    raise _NotStarted(f"it did not answer within {_START_SECONDS:.0f} s")
