"""Flower's ServerApp: the round loop, and a result that is valid however it ends."""

from __future__ import annotations

import logging

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedlora import config as configuration
from fedlora.errors import FedLoraError
from fedlora.events import emit
from fedlora.results import RunRecord

from . import rounds

app = ServerApp()

_log = logging.getLogger("fedlora")


@app.main()
def main(grid: Grid, context: Context) -> None:
    """One run. A failure is written to result.json and raised, so that Flower marks the run as failed."""
    config = configuration.parse(context.run_config, where="run config")
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    record = RunRecord(config)
    _log.info("results: %s", record.folder)
    emit("run-start", folder=record.folder, config=config)
    try:
        rounds.run(grid, config, record, context.run_id)
    except FedLoraError as error:
        record.finish("failed", str(error))
        raise
    except KeyboardInterrupt:
        record.finish("interrupted")
        raise
    except BaseException as error:
        record.finish("failed", f"{type(error).__name__}: {error}")
        raise
    record.finish("completed")
    emit("run-end", folder=record.folder)
