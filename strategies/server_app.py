"""Flower's ServerApp: it plays a run, and leaves a valid result however the run ends."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import RunNotRunningException
from rich.console import Console

from fedlora import config as configuration
from fedlora.common.errors import FedLoraError, RunError
from fedlora.common.events import has_listeners, listen
from fedlora.config import Config
from fedlora.results import journal
from fedlora.results.display import ConsoleLog, RunDisplay
from fedlora.results.record import RunRecord

from .schedules import registry
from .server import audit, link

app = ServerApp()

_log = logging.getLogger("fedlora")


@contextmanager
def _narrated() -> Iterator[None]:
    """Within the block, print lines about the run to Flower's log, unless a display listens already."""
    if has_listeners():
        yield
        return
    console = Console(highlight=False)
    handler = ConsoleLog(console)
    _log.addHandler(handler)
    _log.setLevel(logging.INFO)
    try:
        with RunDisplay(console) as display, listen(display):
            yield
    finally:
        _log.removeHandler(handler)


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Play one run. A failure is written to result.json and raised, so that Flower marks the run as failed."""
    config = configuration.parse(context.run_config, where="run config")
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    link.bound(grid)
    record = RunRecord(config, simulated=getattr(grid, "simulated", False))
    with audit.audited(config, context.run_id, record):
        _run(grid, config, context.run_id, record)


def _run(grid: Grid, config: Config, run_id: int, record: RunRecord) -> None:
    try:
        with _narrated(), journal.journal_to(record.folder / journal.NAME):
            registry.run(grid, config, record, run_id)
    except FedLoraError as error:
        record.finish("failed", str(error))
        raise
    except (KeyboardInterrupt, SystemExit, RunNotRunningException):  # Flower stops a run by the latter two
        full = link.full()  # on a full disk, a SuperLink dies or forgets its runs
        record.finish("failed" if full else "interrupted", full or None)
        raise
    except BaseException as error:
        said = link.reason(error)
        record.finish("failed", said or f"{type(error).__name__}: {error}")
        if said:
            raise RunError(said) from error
        raise
    else:
        record.finish("completed")
    finally:
        link.end_soon(grid)
