"""The time of a run: that of this machine, or the virtual time of an engine that plays device traces."""

from __future__ import annotations

import time
from typing import Protocol

from flwr.serverapp import Grid


class Clock(Protocol):
    """What a schedule knows of time.

    Attributes:
        limit: the time up to which an engine with a virtual clock may go on without being asked again.
    """

    limit: float

    def now(self) -> float:
        """Seconds since the run began."""
        ...

    def go(self, to: float) -> None:
        """Set the time, as a resumed run does."""
        ...

    def pause(self, seconds: float) -> None:
        """Let so much of this machine's time pass, if it is the time of the run."""
        ...


class WallClock:
    """This machine's time."""

    limit = float("inf")

    def __init__(self) -> None:
        self._began = time.monotonic()

    def now(self) -> float:
        return time.monotonic() - self._began

    def go(self, to: float) -> None:
        self._began = time.monotonic() - to

    def pause(self, seconds: float) -> None:
        time.sleep(seconds)


def of(grid: Grid) -> Clock:
    """The clock of a grid that has one, or this machine's."""
    return getattr(grid, "clock", None) or WallClock()


def is_virtual(grid: Grid) -> bool:
    """Whether the engine plays device traces."""
    return getattr(grid, "clock", None) is not None


def awake(grid: Grid, node: int) -> bool:
    """Whether a node's device is there at this time; always true where no traces are played."""
    asked = getattr(grid, "awake", None)
    return asked is None or asked(node)
