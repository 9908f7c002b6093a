"""The ServerApp's connection to its SuperLink: how long the SuperLink may be away, and the causes of its errors."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import httpx
from flwr.serverapp import Grid
from flwr.supercore.retry import RetryInvoker
from flwr.superlink.grid.http_grid import HttpGrid

from fedlora.deployment import superlink_data

# Environment variable with the path of the SuperLink's database, which `fedlora server` sets for its runs.
DATABASE = "FEDLORA_DATABASE"
_AWAY_SECONDS = 300.0  # a SuperLink that died is started again within this time, or never
_END_SECONDS = 60.0  # time for a process to end after its run has ended


def bound(grid: Grid) -> None:
    """Make it an error if the SuperLink does not come back within some minutes."""
    invoker = getattr(grid, "_retry_invoker", None)
    if isinstance(invoker, RetryInvoker):
        invoker.max_time = _AWAY_SECONDS


def end_soon(grid: Grid) -> None:
    """End this process a minute after its run, in case Flower cannot end it because its SuperLink is gone."""
    if not isinstance(grid, HttpGrid):
        return

    def end() -> None:
        time.sleep(_END_SECONDS)
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


def full() -> str:
    """The message that the disk of the SuperLink's database is full; empty if it is not, or if this is unknown."""
    database = os.environ.get(DATABASE)
    said = superlink_data.full(Path(database)) if database else ""
    return f"{said}, and resume the run" if said else ""


def reason(error: BaseException) -> str:
    """The message about an error of the SuperLink; empty for all other errors."""
    if not isinstance(error, httpx.HTTPError):
        return ""
    if said := full():
        return said
    if isinstance(error, httpx.HTTPStatusError):
        code = error.response.status_code
        return f"Flower's SuperLink failed with HTTP status {code}; server.log in the server's state folder says why"
    return (
        f"Flower's SuperLink has not answered for {_AWAY_SECONDS:.0f} s ({type(error).__name__}: {error}); start "
        "fedlora server again, and resume the run"
    )
