"""A process that stays, and answers the messages that Flower's ClientApps give it through a Unix socket.

Flower starts a process for each message. What has to outlive a message is therefore kept by another process: a node's
base model by its worker, and an edge's connection to its own nodes by the ServerApp of its region. It listens with gRPC
on a socket that only its owner can open. Messages are answered one at a time and on the main thread, since torch has a
pool of threads for each thread that computes.
"""

from __future__ import annotations

import hashlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
from flwr.app import Context, Error, RecordDict
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from fedlora.common.errors import ConfigError
from fedlora.common.events import listen
from fedlora.common.files import replacing

from . import envelope

Check = Callable[[], None]
Answer = Callable[[str, RecordDict, Context, Check], RecordDict | Error]
LOOK_SECONDS = 1.0
_HEALTH_SECONDS = 20.0  # a process that computes releases Python's lock many times a second, and so answers in time
_log = logging.getLogger("fedlora")


class DroppedError(BaseException):
    """Nobody waits for this message's answer any more. As a BaseException, it is not answered like an error."""


def serve(socket: Path, answer: Answer, idle_seconds: float, needed: Callable[[], bool]) -> None:
    """Answer messages until the socket is gone, `needed` is false, or no message has come for a while.

    Args:
        socket: path of the Unix socket; `worker.pid` is written beside it.
        answer: called with a message's task, content and context, and with a function that raises `DroppedError` as
            soon as nobody waits for the answer.
        idle_seconds: seconds without a message after which the process is not needed any more.
        needed: whether the process is needed; asked about once a second.

    Raises:
        ConfigError: the socket cannot be made.
    """
    inbox = _Inbox()
    server = grpc.server(ThreadPoolExecutor(max_workers=16), options=envelope.GRPC_OPTIONS)
    method = grpc.unary_stream_rpc_method_handler(lambda request, context: _handle(request, context, inbox))
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(envelope.SERVICE, {envelope.METHOD: method})])
    health_service = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_service, server)
    try:
        with _for_its_owner_alone():
            server.add_insecure_port(f"unix:{socket}")
    except RuntimeError:
        raise ConfigError(
            f"--socket {socket}: cannot listen there; give a path of fewer than 100 characters in a folder that exists"
        ) from None
    with replacing(socket.with_name("worker.pid")) as part:
        part.write_text(str(os.getpid()))
    server.start()
    health_service.set(envelope.SERVICE, health_pb2.HealthCheckResponse.SERVING)
    _log.info("worker: listening on %s", socket)
    mine = socket.stat().st_ino
    last, last_trained = time.monotonic(), _Trained()
    try:
        while time.monotonic() - last < idle_seconds and _is_there(socket, mine) and needed():
            try:
                job = inbox.get(timeout=LOOK_SECONDS)
            except queue.Empty:
                continue
            inbox.at_work = job
            try:
                last_trained = job.run(answer, last_trained)
            finally:
                job.frames.put(None)
            last = time.monotonic()
    finally:
        server.stop(grace=1.0)
        if _is_there(socket, mine):
            socket.unlink(missing_ok=True)


def is_healthy(socket: Path) -> bool:
    """Whether a process listens on the socket and is well."""
    if not socket.exists():
        return False
    with channel(socket) as there:
        check = health_pb2_grpc.HealthStub(there).Check  # pyright: ignore[reportAttributeAccessIssue] - made in __init__
        try:
            answer = check(health_pb2.HealthCheckRequest(service=envelope.SERVICE), timeout=_HEALTH_SECONDS)
        except grpc.RpcError:
            return False
    return answer.status == health_pb2.HealthCheckResponse.SERVING


def channel(socket: Path) -> grpc.Channel:
    """A connection to the process that listens on the socket."""
    return grpc.insecure_channel(f"unix:{socket}", options=envelope.GRPC_OPTIONS)


def runs(process: psutil.Process | None) -> bool:
    """Whether a process still runs; True if there is none to watch."""
    try:
        return process is None or (process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@dataclass(frozen=True)
class _Trained:
    """The last answer to a training message, in case the server never got it and asks again."""

    digest: bytes = b""
    answer: bytes = b""


class _Job:
    """One message, with a queue of the frames of its reply: events, and the answer at last."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self.frames: queue.Queue[bytes | None] = queue.Queue()
        self.dropped = threading.Event()

    def run(self, answer: Answer, last: _Trained) -> _Trained:
        """Answer the message; return the last answer to a training message."""
        if self.dropped.is_set():
            return last
        self.frames.put(envelope.pack_event(envelope.BEGUN, {}))
        digest = hashlib.sha256(self._request).digest()
        if digest == last.digest:
            self.frames.put(last.answer)
            return last
        task, content, context = envelope.unpack_request(self._request)
        try:
            with listen(self._tell):
                result = answer(task, content, context, self._check)
        except DroppedError:
            _log.warning("worker: %s was dropped, since nobody waits for its answer any more", task)
            return last
        packed = envelope.pack_answer(result)
        self.frames.put(packed)
        return _Trained(digest, packed) if task == "train" and not isinstance(result, Error) else last

    def _check(self) -> None:
        if self.dropped.is_set():
            raise DroppedError

    def _tell(self, kind: str, facts: dict[str, Any]) -> None:
        self._check()
        self.frames.put(envelope.pack_event(kind, facts))


class _Inbox(queue.Queue[_Job]):
    """Messages that wait for their turn.

    Attributes:
        at_work: the message that is answered, or the last that was.
    """

    at_work: _Job | None = None


def _handle(request: bytes, context: grpc.ServicerContext, inbox: _Inbox) -> Iterator[bytes]:
    job = _Job(request)
    context.add_callback(job.dropped.set)
    inbox.put(job)
    while context.is_active():
        try:
            frame = job.frames.get(timeout=LOOK_SECONDS)
        except queue.Empty:
            # whoever waits for the answer of the message at work also sees when the work on it hangs
            before = inbox.at_work
            if before is not None and before is not job and not before.dropped.is_set():
                yield envelope.pack_event(envelope.WAITING, {})
            continue
        if frame is None:
            return
        yield frame


def _is_there(socket: Path, inode: int) -> bool:
    """Whether the socket is still the one that this process made, and not that of a successor."""
    try:
        return socket.stat().st_ino == inode
    except OSError:
        return False


@contextmanager
def _for_its_owner_alone() -> Iterator[None]:
    before = os.umask(0o177)
    try:
        yield
    finally:
        os.umask(before)
