"""What an edge's node does in place of starting a worker: it makes sure that this run goes on in its region."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock
from flwr.app import Context

from fedlora import config as configuration
from fedlora.common.events import emit
from fedlora.deployment import edge
from fedlora.deployment.resident import is_healthy


def is_edge(context: Context) -> bool:
    """Whether this node is that of an edge."""
    return "region" in context.node_config


def make_sure(socket: Path, context: Context) -> None:
    """Start a run on the edge's own server, unless the one that goes on there is of the run of this message.

    Args:
        socket: path of the Unix socket on which the region's ServerApp listens.
        context: of this run; the node's config names the edge's own server.

    Raises:
        FedLoraError: the run's configuration is wrong, or the run cannot begin in the region.
    """
    belongs = socket.with_name("run")
    with FileLock(socket.with_name("start.lock")):
        known = belongs.read_text(encoding="utf-8") if belongs.exists() else ""  # none if the last start was cut off
        if is_healthy(socket) and known == str(context.run_id):
            return
        belongs.unlink(missing_ok=True)
        settings = context.node_config
        ca = Path(str(settings["region-ca"])) if "region-ca" in settings else None
        emit("region-start", run=context.run_id)
        edge.begin(configuration.parse(context.run_config, where="run config"), str(settings["region"]), ca, socket)
        belongs.write_text(str(context.run_id), encoding="utf-8")
