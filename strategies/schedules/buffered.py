"""Schedules whose rounds do not wait for all clients: buffered, one by one, and with a deadline."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from fedlora.common.errors import ConfigError
from fedlora.config import clients_per_round

from ..server.overlapping import Rules
from .base import Schedule
from .session import Session


@dataclass(frozen=True)
class Buffered(Schedule):
    """A round ends as soon as it has `size` updates, whenever their clients began; a new client starts as one ends.

    Nguyen et al. 2022, "Federated Learning with Buffered Asynchronous Aggregation" (FedBuff),
    https://arxiv.org/abs/2106.06639. Each client's change since its own start is applied to the present model, times
    `rate / sqrt(1 + staleness)`, where the staleness is the number of rounds that ended while it trained. With as many
    clients at once as updates in a round, and clients that all need the same time, the run is the synchronous one, bit
    by bit. Differences from the paper: changes are weighted by the clients' numbers of examples, as in FedAvg.

    Args:
        size: M, the number of updates that end a round; 0: as many as a synchronous round asks.
        at_once: number of clients that train at a time; 0: as many as `size`.
        rate: share of the mean change that is applied, in (0, 1].
        power: p in the damping `(1 + staleness)^-p`; 0: none.
        oldest: largest staleness of an update that counts; 0: any.
    """

    overlaps: ClassVar[bool] = True

    size: int = 0
    at_once: int = 0
    rate: float = 1.0
    power: float = 0.5
    oldest: int = 0

    def __post_init__(self) -> None:
        _check(self.size >= 0 and self.at_once >= 0, "size and at_once", "0 or more")
        _check(0 < self.rate <= 1, "rate", "a number above 0, at most 1")
        _check(self.power >= 0 and self.oldest >= 0, "power and oldest", "0 or more")

    def play(self, session: Session) -> None:
        federation = session.config.federation
        size = self.size or clients_per_round(len(session.roster.infos), federation.fraction)
        at_once = self.at_once or size
        if not size <= at_once <= federation.clients:
            raise ConfigError(
                f"federation.schedule-options: {at_once} clients at once and {size} updates in a round, of "
                f"{federation.clients} clients; expected size <= at_once <= federation.clients"
            )
        session.overlap(Rules(size, at_once, rate=self.rate, power=self.power, oldest=self.oldest or math.inf))
        while session.done < session.rounds:
            session.play(session.done + 1)


@dataclass(frozen=True)
class FedAsync(Buffered):
    """Each update is a round of its own.

    Xie et al. 2019, "Asynchronous Federated Optimization" (FedAsync), https://arxiv.org/abs/1903.03934, with polynomial
    damping of the power 1/2. Difference from the paper: its mixing `(1 - a) w + a w_k` draws the model towards the
    client's whole model, and so takes back a part of what others did meanwhile; here the client's change is added.

    Args:
        size: must stay 1.
        at_once: number of clients that train at a time; 0: as many as a synchronous round asks.
        rate: share of each change that is applied, the paper's alpha.
        power: p in the damping `(1 + staleness)^-p`; 0: none.
        oldest: largest staleness of an update that counts; 0: any.
    """

    size: int = 1
    rate: float = 0.6

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.size == 1, "size", "1 with fedasync, or federation.schedule = buffered")

    def play(self, session: Session) -> None:
        count = clients_per_round(len(session.roster.infos), session.config.federation.fraction)
        Buffered(1, self.at_once or count, self.rate, self.power, self.oldest).play(session)


@dataclass(frozen=True)
class Deadline(Schedule):
    """A round asks more clients than it needs, and ends when enough have answered, or after some time.

    Bonawitz et al. 2019, "Towards Federated Learning at Scale: System Design", https://arxiv.org/abs/1902.01046,
    section 2: over-selection and a time limit. A round goes on beyond the limit until `federation.min-clients` have
    answered.

    Args:
        seconds: time after which a round ends; of the device traces where they are played, else of the clock.
        more: share of clients that is asked besides those that a synchronous round asks.
        late: "use": what comes too late counts in the round in which it comes, damped as by `buffered`; "drop": it
            does not count.
        power: p in the damping `(1 + staleness)^-p`; 0: none.
    """

    overlaps: ClassVar[bool] = True

    seconds: float = 600.0
    more: float = 0.3
    late: Literal["use", "drop"] = "use"
    power: float = 0.5

    def __post_init__(self) -> None:
        _check(self.seconds > 0, "seconds", "a number above 0")
        _check(self.more >= 0 and self.power >= 0, "more and power", "0 or more")

    def play(self, session: Session) -> None:
        count = len(session.roster.infos)
        size = clients_per_round(count, session.config.federation.fraction)
        asked = min(count, math.ceil(size * (1 + self.more)))
        oldest = math.inf if self.late == "use" else 0
        session.overlap(Rules(size, asked, refill=False, seconds=self.seconds, power=self.power, oldest=oldest))
        while session.done < session.rounds:
            session.play(session.done + 1)


def _check(right: bool, names: str, expected: str) -> None:
    if not right:
        raise ConfigError(f"federation.schedule-options: {names}: expected {expected}")
