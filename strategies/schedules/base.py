"""The base class of schedules. A schedule decides which clients are asked, and when replies are aggregated."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from .session import Session


class Schedule(ABC):
    """Plays the rounds of a session. A subclass is a frozen dataclass whose fields are its options.

    All state of the run is in the session; a schedule has none of its own.

    Attributes:
        overlaps: whether clients still train when a round ends.
    """

    overlaps: ClassVar[bool] = False

    @abstractmethod
    def play(self, session: Session) -> None:
        """Play the rounds from `session.done + 1` to `session.rounds`.

        In a run that is resumed, `session.done` is not 0 at first. If a client's reply made a round useless,
        `session.done` does not grow, and that client is left out from then on; the round must be played again.
        """
