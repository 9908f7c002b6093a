"""The ServerApp's connection to its SuperLink: how long that may be away, and what its errors come from."""

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

# The SuperLink's database, which `fedlora server` names for its runs: they are on its machine.
DATABASE = "FEDLORA_DATABASE"
_AWAY_SECONDS = 300.0  # a SuperLink that died is back in less: it is started again, or never
_END_SECONDS = 60.0  # that a process may take to end, once its run has ended


def bound(grid: Grid) -> None:
    """From now on, a SuperLink that does not come back is an error after some minutes."""
    invoker = getattr(grid, "_retry_invoker", None)
    if isinstance(invoker, RetryInvoker):
        invoker.max_time = _AWAY_SECONDS


def end_soon(grid: Grid) -> None:
    """The run has ended: a process that Flower cannot end, since its SuperLink is gone, ends all the same."""
    if not isinstance(grid, HttpGrid):
        return

    def end() -> None:
        time.sleep(_END_SECONDS)
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


def full() -> str:
    """That the disk of the SuperLink's database is full; empty where it is not, or is not known."""
    database = os.environ.get(DATABASE)
    said = superlink_data.full(Path(database)) if database else ""
    return f"{said}, and resume the run" if said else ""


def reason(error: BaseException) -> str:
    """What went wrong at the SuperLink, in words; empty for an error that is not its."""
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
