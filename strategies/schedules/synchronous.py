"""The synchronous schedule: one round after another, each waiting for all clients that it asked."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Schedule
from .session import Session


@dataclass(frozen=True)
class Synchronous(Schedule):
    """Each round asks a share `federation.fraction` of the clients, and ends when all of these replied or failed."""

    def play(self, session: Session) -> None:
        while session.done < session.rounds:
            session.play(session.done + 1)
