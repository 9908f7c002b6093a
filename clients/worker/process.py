"""The node's resident worker: it keeps the base model in memory and answers the messages that ClientApps give it.

It listens with gRPC on a Unix socket that only its owner can open. Messages are answered one at a time and on the main
thread, since torch has a pool of threads for each thread that computes.
"""

from __future__ import annotations

import hashlib
import logging
import os
import queue
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
from flwr.app import Error
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from fedlora.common.errors import ConfigError
from fedlora.common.events import listen
from fedlora.common.files import replacing

from . import envelope

_LOOK_SECONDS = 1.0
_log = logging.getLogger("fedlora")


def serve(socket: Path, node_pid: int | None, idle_seconds: float) -> None:
    """Answer messages until the node is gone, the socket is gone, or no message has come for a while.

    Args:
        socket: path of the Unix socket; `worker.pid` is written beside it.
        node_pid: process id of the node; None: the idle time alone decides.
        idle_seconds: seconds without a message after which the worker ends, which frees its memory. The next message
            starts another worker.

    Raises:
        ConfigError: the socket cannot be made.
    """
    try:
        node = None if node_pid is None else psutil.Process(node_pid)
    except psutil.NoSuchProcess:
        return
    inbox: queue.Queue[_Job] = queue.Queue()
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
    last, last_trained = time.monotonic(), _Trained()
    try:
        while time.monotonic() - last < idle_seconds and _is_needed(socket, node):
            try:
                job = inbox.get(timeout=_LOOK_SECONDS)
            except queue.Empty:
                continue
            try:
                last_trained = job.run(last_trained)
            finally:
                job.frames.put(None)
            last = time.monotonic()
    finally:
        server.stop(grace=1.0)
        socket.unlink(missing_ok=True)


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

    def run(self, last: _Trained) -> _Trained:
        """Answer the message; return the last answer to a training message."""
        if self.dropped.is_set():
            return last
        self.frames.put(envelope.pack_event(envelope.BEGUN, {}))
        digest = hashlib.sha256(self._request).digest()
        if digest == last.digest:
            self.frames.put(last.answer)
            return last
        from ..answering.dispatch import answer  # imports torch, only after the socket is there

        task, content, context = envelope.unpack_request(self._request)
        context.node_config = {**context.node_config, "resident": True}
        try:
            with listen(self._tell):
                result = answer(task, content, context)
        except _Dropped:
            _log.warning("worker: %s was dropped, since nobody waits for its answer any more", task)
            return last
        packed = envelope.pack_answer(result)
        self.frames.put(packed)
        return _Trained(digest, packed) if task == "train" and not isinstance(result, Error) else last

    def _tell(self, kind: str, facts: dict[str, Any]) -> None:
        if self.dropped.is_set():
            raise _Dropped
        self.frames.put(envelope.pack_event(kind, facts))


class _Dropped(BaseException):
    """Nobody waits for this message's answer any more. As a BaseException, it is not answered like an error."""


def _handle(request: bytes, context: grpc.ServicerContext, inbox: queue.Queue[_Job]) -> Iterator[bytes]:
    job = _Job(request)
    context.add_callback(job.dropped.set)
    inbox.put(job)
    while context.is_active():
        try:
            frame = job.frames.get(timeout=_LOOK_SECONDS)
        except queue.Empty:
            continue
        if frame is None:
            return
        yield frame


def _is_needed(socket: Path, node: psutil.Process | None) -> bool:
    try:
        return socket.exists() and (node is None or (node.is_running() and node.status() != psutil.STATUS_ZOMBIE))
    except psutil.NoSuchProcess:
        return False


@contextmanager
def _for_its_owner_alone() -> Iterator[None]:
    before = os.umask(0o177)
    try:
        yield
    finally:
        os.umask(before)
