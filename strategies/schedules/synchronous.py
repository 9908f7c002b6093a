"""One round after another; each waits for all clients that it asked."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Schedule
from .session import Session


@dataclass(frozen=True)
class Synchronous(Schedule):
    """Each round samples `federation.fraction` of the clients, and ends when they have answered or failed."""

    def play(self, session: Session) -> None:
        while session.done < session.rounds:
            session.play(session.done + 1)
