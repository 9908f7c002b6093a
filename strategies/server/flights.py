"""Clients that train while rounds go on, each from the state of the round in which it was asked."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedlora.common.errors import RunError
from fedlora.common.files import replacing
from fedlora.exchange import Broadcast, ClientInfo, wire

from .clock import Clock
from .mailbox import Mailbox
from .roster import Roster

_LONGEST_PAUSE_SECONDS = 1.0


@dataclass
class Flight:
    """A client that was asked to train and whose answer has not counted yet.

    Attributes:
        client: the client.
        number: the round in which it was asked; it starts from the state before this round.
        asked: the time at which it was asked.
        make: makes its broadcast, from the state before that round.
        sent: the broadcast as the client received it.
    """

    client: int
    number: int
    asked: float
    make: Callable[[ClientInfo], Broadcast]
    sent: Broadcast | None = None


class Flights:
    """All clients that are training, for a whole run. Each has one question at a time.

    Args:
        grid: carries the messages.
        clock: the run's time.
        timeout: seconds after which a client that has not answered is given up; 0: never.
    """

    def __init__(self, grid: Grid, clock: Clock, timeout: float) -> None:
        self.clock = clock
        self.open: dict[int, Flight] = {}
        self._asked: dict[int, Flight] = {}  # by the tag of the question, of which each has its own
        self._tags = count()
        self._timeout = timeout
        self._mailbox = Mailbox(grid, "train", "overlapping", 0.0)
        self._early: list[tuple[Flight, Message | None]] = []

    def ask(self, flight: Flight, roster: Roster, encoded: Callable[[int], RecordDict]) -> None:
        """Ask a client, each in a message of its own; `encoded` makes its content and sets `flight.sent`."""
        client = flight.client
        self.open[client] = flight
        tag = next(self._tags)
        self._asked[tag] = flight
        self._mailbox.post(
            roster.nodes[client],
            partial(roster.message, roster.nodes[client], [client], encoded),
            most=lambda: wire.most_bytes(flight.sent) if flight.sent else 0,
            tag=tag,
        )

    def hear(self, until: float) -> list[tuple[Flight, Message | None]]:
        """The next answers, in the order of client ids; None for an answer that will not come.

        Several answers that came at the same time are handed out together. There are none if the time `until` comes
        before an answer, or if nobody was asked.
        """
        self.clock.limit, pause = min(until, *self._deadlines.values(), math.inf), 0.02
        found, self._early = self._early, []
        while not found and self.open:
            heard = [*self._mailbox.arrived(), *((tag, None) for tag in self._mailbox.take_unsent())]
            found = [(self._asked[tag], reply) for tag, reply in heard if tag in self._asked]
            found += [(flight, None) for flight in self._overdue() if all(flight is not one for one, _ in found)]
            if not found and self.clock.now() >= until:
                break
            if not found:
                self.clock.pause(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
        self.give_up([flight.client for flight, _ in found])
        return sorted(found, key=lambda each: each[0].client)

    def give_up(self, clients: Iterable[int]) -> None:
        """Hear no more of what these clients were asked; the state that they started from may be gone."""
        for client in clients:
            del self.open[client]
        self._early = [(flight, reply) for flight, reply in self._early if flight.client in self.open]
        for tag in [tag for tag, flight in self._asked.items() if flight.client not in self.open]:
            del self._asked[tag]
            self._mailbox.give_up(tag)

    def put_back(self, answers: Iterable[tuple[Flight, Message | None]]) -> None:
        """Keep answers that came together with others, for the next call of `hear`."""
        for flight, reply in answers:
            self.open[flight.client] = flight
            self._early.append((flight, reply))

    def save(self, folder: Path, number: int, keep: int = 1) -> set[int]:
        """Write down who is training after a round, and since when.

        What was written after the `keep` rounds before it stays, so that a run can go back to them.

        Returns:
            The rounds after which the server's state must be kept, since clients were training from it.

        Raises:
            RunError: the file cannot be written, or an earlier one cannot be read.
        """
        path = _path(folder, number)
        about = [[flight.client, flight.number, flight.asked] for flight in self.open.values()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(path) as part:
                part.write_text(json.dumps({"now": self.clock.now(), "training": about}), encoding="utf-8")
            kept = [each for each in range(number - keep, number + 1) if _path(folder, each).exists()]
            for old in {*folder.glob("training-*.json")} - {_path(folder, each) for each in kept}:
                old.unlink()
        except OSError as error:
            raise RunError(f"{path}: cannot be written: {error}; make room, and resume the run") from error
        return {begun - 1 for each in kept for _, begun, _ in saved(folder, each)[1]}

    @property
    def _deadlines(self) -> dict[int, float]:
        """Client id -> the time at which it is given up."""
        return {c: flight.asked + self._timeout for c, flight in self.open.items()} if self._timeout else {}

    def _overdue(self) -> list[Flight]:
        return [self.open[client] for client, time in self._deadlines.items() if self.clock.now() >= time]


def saved(folder: Path, number: int) -> tuple[float, Sequence[tuple[int, int, float]]]:
    """(the time, [(client, round, time at which it was asked)]) that `Flights.save` wrote after a round.

    Raises:
        RunError: there is no such file, or it cannot be read.
    """
    path = _path(folder, number)
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        return float(about["now"]), [(int(c), int(n), float(t)) for c, n, t in about["training"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path}: not readable ({error}); this run cannot continue, start a new one") from None


def _path(folder: Path, number: int) -> Path:
    return folder / f"training-{number}.json"
