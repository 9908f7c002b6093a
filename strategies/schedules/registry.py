"""Schedules by name, and a run under the schedule that its config names."""

from __future__ import annotations

from flwr.serverapp import Grid

from fedlora.common.registry import Registry
from fedlora.config import Config
from fedlora.results.record import RunRecord

from ..configured import configured
from ..server import overlapping
from .session import Session

SCHEDULES = Registry(
    noun="schedule",
    key="federation.schedule",
    options_key="federation.schedule-options",
    base="fedlora.strategies.schedules.base:Schedule",
    method="play",
    names={
        "synchronous": "fedlora.strategies.schedules.synchronous:Synchronous",
        "buffered": "fedlora.strategies.schedules.buffered:Buffered",
        "fedasync": "fedlora.strategies.schedules.buffered:FedAsync",
        "deadline": "fedlora.strategies.schedules.buffered:Deadline",
    },
)


def run(grid: Grid, config: Config, record: RunRecord, run_id: int) -> None:
    """Run a whole federation.

    After every round, the server's state is saved, so that an interrupted run can be resumed.

    Args:
        grid: carries the server's messages to the clients.
        config: the run's configuration.
        record: gets the numbers of every complete round, and the sum of all updates as one adapter for the unchanged
            base model.
        run_id: Flower's number of the run.

    Raises:
        RunError: fewer clients than `federation.min-clients` connected or replied in a round; or, after the last
            round, a client had been refused in every round.
        StrategyError: the strategy cannot serve these clients, or nothing could evaluate the adapter that it makes.
        ConfigError: there is no such schedule, initializer or kind of adapter.
    """
    schedule = SCHEDULES.make(config.federation.schedule, config.federation.schedule_options)
    if schedule.overlaps:
        overlapping.check(configured(config), config)
    session = Session.open(grid, config, record, run_id)
    session.begin()
    schedule.play(session)
    session.close()
