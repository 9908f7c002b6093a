"""The ServerApp of an edge: it stays between messages, and asks the nodes of its region what the server above asks.

The run of a federation reaches an edge as messages to its node. The node's ClientApp starts a run of the same
configuration on the edge's own server, whose ServerApp this is, and hands the messages over through a Unix socket.
"""

from __future__ import annotations

import logging

from flwr.app import Context, Error, RecordDict
from flwr.serverapp import Grid, ServerApp

from fedlora import config as configuration
from fedlora.deployment import resident
from fedlora.deployment.edge import Post

from .server import link
from .server.region import Region

app = ServerApp()

_IDLE_SECONDS = 3600.0  # without a message; the next one starts another run
_log = logging.getLogger("fedlora")


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Answer messages until the edge ends, another run takes this one's place, or no message has come for an hour."""
    config = configuration.parse(context.run_config, where="run config")
    post = Post.mine()
    link.bound(grid)
    region = Region(grid, config, post.name, post.clients)
    given_up = False

    def answer(task: str, content: RecordDict, _: Context, check: resident.Check) -> RecordDict | Error:
        nonlocal given_up
        try:
            return region.answer(task, content, check)
        except resident.DroppedError:
            given_up = True  # only the end of this run stops the nodes that are at work
            raise

    _log.info("edge: the run goes on in the region, for up to %d clients", post.clients)
    resident.serve(post.socket, answer, _IDLE_SECONDS, lambda: not given_up and post.is_held())
    link.end_soon(grid)
