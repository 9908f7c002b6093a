"""The node's resident worker: it keeps the base model in memory and answers the messages that ClientApps give it."""

from __future__ import annotations

from pathlib import Path

import psutil
from flwr.app import Context, Error, RecordDict

from fedlora.deployment import resident


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
    resident.serve(socket, _answered, idle_seconds, lambda: resident.runs(node))


def _answered(task: str, content: RecordDict, context: Context, _check: resident.Check) -> RecordDict | Error:
    from ..answering.dispatch import answer  # imports torch, only after the socket is there

    context.node_config = {**context.node_config, "resident": True}
    return answer(task, content, context)
