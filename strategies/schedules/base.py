"""A schedule: whom to ask, and when to aggregate."""

from __future__ import annotations

from abc import ABC, abstractmethod

from .session import Session


class Schedule(ABC):
    """A frozen dataclass whose fields are its options. It plays a session, and keeps nothing else."""

    @abstractmethod
    def play(self, session: Session) -> None:
        """Play the rounds from `session.done + 1` to `session.rounds`.

        A run that is resumed has some of them behind it. Where one client spoiled a round, `session.done` stays as it
        was, and that client is left out from then on: the round is to be played again.
        """
