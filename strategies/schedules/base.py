"""A schedule: whom to ask, and when to aggregate."""

from __future__ import annotations

from abc import ABC, abstractmethod

from .session import Session


class Schedule(ABC):
    """A frozen dataclass whose fields are its options. It plays a session, and keeps nothing else."""

    @abstractmethod
    def play(self, session: Session) -> None:
        """Play the rounds from `session.done + 1` to `session.rounds`.

        A run that is resumed has some of them behind it. A round that returns False was spoiled by one client, who is
        left out from then on: it, or the one before it, is to be played again, from `session.done + 1`.
        """
