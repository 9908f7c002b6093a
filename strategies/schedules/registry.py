"""Schedules by name, and a run by the one that its config names."""

from __future__ import annotations

from flwr.serverapp import Grid

from fedlora.common.registry import Registry
from fedlora.config import Config
from fedlora.results.record import RunRecord

from .session import Session

SCHEDULES = Registry(
    noun="schedule",
    key="federation.schedule",
    options_key="federation.schedule-options",
    base="fedlora.strategies.schedules.base:Schedule",
    method="play",
    names={"synchronous": "fedlora.strategies.schedules.synchronous:Synchronous"},
)


def run(grid: Grid, config: Config, record: RunRecord, run_id: int) -> None:
    """Run a whole federation.

    `record` keeps everything learned, as one adapter on the untouched base, and the numbers of every complete round,
    and so survives an interruption; the server's state is saved after every round, and lets the run go on from there.

    Raises:
        RunError: fewer clients than `federation.min-clients` connected, or answered a round; or, once all rounds are
            done, a client was refused in every one of them.
        StrategyError: the strategy cannot serve these clients, or nobody could evaluate what it learns.
        ConfigError: there is no such schedule, initializer or kind of adapter.
    """
    schedule = SCHEDULES.make(config.federation.schedule, config.federation.schedule_options)
    session = Session.open(grid, config, record, run_id)
    session.begin()
    schedule.play(session)
    session.close()
