"""A round of a schedule that does not wait for all: clients train from older states, and each has its staleness."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from flwr.app import Message, RecordDict

from fedlora.common.errors import StrategyError
from fedlora.config import Config
from fedlora.exchange import ClientUpdate, wire

from ..base import Strategy, trained_in_turn
from ..wrappers.wrapper import innermost
from . import clock
from .answers import AwayError
from .collect import TrainRound, adding
from .flights import Flight, Flights
from .rebased import rebased
from .sampling import drawn

_AGAIN_SECONDS = 5.0  # pause before clients are asked again whose nodes were not there


@dataclass(frozen=True)
class Rules:
    """When a round ends, and what an update counts that began in an earlier one.

    Args:
        size: number of usable updates that end a round.
        at_once: number of clients that train at a time.
        refill: whether a new client starts as one ends; else clients start at the beginning of a round alone.
        seconds: time after which a round ends if it has an update; inf: no limit.
        rate: share of each client's change that is applied.
        power: p in the damping `(1 + staleness)^-p`.
        oldest: largest staleness of an update that counts.
    """

    size: int
    at_once: int
    refill: bool = True
    seconds: float = math.inf
    rate: float = 1.0
    power: float = 0.5
    oldest: float = math.inf

    def share(self, staleness: int) -> float:
        """The share of a client's change that is applied."""
        return self.rate * (1.0 + staleness) ** -self.power


def check(strategy: Strategy, config: Config) -> None:
    """Check, before the run, that updates of older versions can be used.

    Raises:
        StrategyError: they cannot; the message says why, and names strategies that can.
    """
    asked, inside = f"federation.schedule = {config.federation.schedule}", innermost(strategy)
    turns = {frozenset(each) for each in trained_in_turn(strategy)}
    for wrong, why in (
        (
            not (strategy.steady or inside.anew) or len(turns) > 1 or inside.replaces_folds or inside.own_rows,
            f"strategy.name = {config.strategy.name} changes from round to round what a client's factors mean, so that "
            "an update that began in an earlier round cannot be used; use fedavg, fedavg-zeropad, ffa, fedsb, flora or "
            "florist",
        ),
        (
            bool(strategy.personal),
            f"strategy.name = {config.strategy.name} keeps factors on the clients; use fedavg or ffa",
        ),
        (config.strategy.correction != "none", f"strategy.correction = {config.strategy.correction} needs one start"),
        (config.strategy.restart_every > 0, "strategy.restart-every starts the adapter anew; set it to 0"),
        (config.train.layers_per_round > 0, "train.layers-per-round changes what is trained; set it to 0"),
        (config.privacy.level != "none", f"privacy.level = {config.privacy.level} is accounted by whole rounds"),
        (config.privacy.secure_sum, "privacy.secure-sum needs all clients of a round at the same time"),
        (
            config.wire.sum != "none" and not inside.anew,
            f"wire.sum = {config.wire.sum}: sketches of strategy.name = {config.strategy.name} cannot be moved to "
            "another start; use flora or florist, or set wire.sum = none",
        ),
        (
            config.wire.sum != "none" and config.wire.sketch_passes == 2,
            "wire.sketch-passes = 2 asks all clients of a sum again, of whom some train already; set 1",
        ),
        (
            config.anchor.base_update == "merge",
            "anchor.base-update = merge: a client of an earlier round needs the weights of before a merge; set anchor",
        ),
    ):
        if wrong:
            raise StrategyError(f"{asked}: {why}")


@dataclass
class OverlappingRound(TrainRound):
    """A round that ends by `rules`, with updates of clients that were asked in this round or in earlier ones.

    Attributes:
        flights: the clients that are training, for the whole run.
        rules: when the round ends.
        present: the clients that may be asked.
        anew: whether each round begins with an update of zero; see `rebased`.
        staleness: client id -> number of rounds that ended between its question and its answer.
    """

    flights: Flights = None  # pyright: ignore[reportAssignmentType] - always given
    rules: Rules = None  # pyright: ignore[reportAssignmentType]
    present: Sequence[int] = ()
    anew: bool = False
    staleness: dict[int, int] = field(default_factory=dict)
    _asked: int = 0
    _at_once: int = 0

    def updates(self, chosen: Sequence[int]) -> Iterator[ClientUpdate]:
        """The updates of this round in the order of client ids, as if all had begun from the present state."""
        rules, flights = self.rules, self.flights
        self.began = flights.clock.now()
        self._ask(chosen)
        self._at_once = rules.at_once if rules.refill else len(flights.open)
        waiting: dict[int, Callable[[], ClientUpdate]] = {}
        ends = self.began + rules.seconds
        least = max(1, self.config.federation.min_clients)
        alone = math.inf  # since nobody trains any more
        while len(waiting) < rules.size:
            if not flights.open:
                alone = min(alone, flights.clock.now())
                if len(waiting) < least and (others := self.pick(rules.at_once)):  # that slept as the round began
                    self._ask(others)
                    continue
                too_few = len(waiting) < least and flights.clock.now() < alone + self.config.federation.wait_timeout
                if not (too_few and self._ask_absent()):
                    break
                continue
            with adding(self, "wait_seconds"):
                heard = flights.hear(ends if len(waiting) >= least else math.inf)
            if not heard:
                break
            for place, (flight, reply) in enumerate(heard):
                if len(waiting) == rules.size:
                    flights.put_back(heard[place:])
                    break
                with adding(self, "decode_seconds"):
                    if (update := self._read(flight, reply)) is not None:
                        waiting[flight.client] = self.shelf.put(update)
            if len(waiting) < rules.size and rules.refill:
                self._ask(self.pick(rules.at_once - len(flights.open)))
            if len(waiting) >= least and flights.clock.now() >= ends:
                break
        weights = self.weights(sorted(waiting))
        self.kept = [_at_most(update, weights) for update in self.kept]
        for client in sorted(waiting):
            update = _at_most(waiting[client](), weights)
            self.answers[client]["num-examples"] = update.num_examples
            yield update

    def pick(self, count: int) -> list[int]:
        """Clients to ask: drawn from those that neither train nor were asked in this round, and are awake.

        If none of them is awake, sleeping ones are asked, which begin when they wake. Only as many clients are looked
        at as it takes to find enough; if nobody is busy or sleeps, they are those of the synchronous schedule.
        """
        again = f"/{self._asked}" if self._asked else ""
        self._asked += 1
        draw = random.Random(f"{self.config.run.seed}/{self.number}{again}")

        def free(client: int) -> bool:
            return not (client in self.flights.open or client in self.staleness or client in self.failures)

        there, asleep = drawn(self.present, count, draw, self.awake, free)
        return sorted(there if there or self.flights.open else asleep)

    def expected(self, chosen: Sequence[int]) -> int:
        return min(self.rules.size, len(self.present))

    def facts(self) -> dict[str, object]:
        """What the round's entry in the record has besides."""
        now = self.flights.clock.now()
        return {
            "time": now,
            "staleness": dict(sorted(self.staleness.items())),
            "at-once": self._at_once,
            "training-seconds": sum(now - flight.asked for flight in self.flights.open.values()),
        }

    def depart(self, flight: Flight) -> None:
        """Ask a client; the state that it starts from is in `flight.make`."""
        self.flights.ask(flight, self.roster, lambda client, flight=flight: self._departing(flight))

    def _ask(self, clients: Sequence[int]) -> None:
        for client in clients:
            self.depart(Flight(client, self.number, self.flights.clock.now(), self.make_broadcast))

    def _ask_absent(self) -> bool:
        """After a pause, ask clients again whose nodes were not there and are back; False if no client was away."""
        away = self.failures.keys() - self.refused
        if not away or clock.is_virtual(self.grid):
            return False
        with adding(self, "wait_seconds"):
            self.flights.clock.pause(_AGAIN_SECONDS)
        there = {*self.grid.get_node_ids()}
        for client in away:
            if self.roster.nodes[client] in there:
                del self.failures[client]
        self._ask(self.pick(self.rules.at_once))
        return True

    def _departing(self, flight: Flight) -> RecordDict:
        with adding(self, "encode_seconds"):
            broadcast = flight.make(self.roster.infos[flight.client])
            content = wire.encode_broadcast(broadcast, self.fingerprint, self.config.wire.dtype)
            flight.sent = wire.as_received(broadcast, self.config.wire.dtype)
            self.crossed(flight.client, "download", wire.payload_bytes(content))
            return content

    def _read(self, flight: Flight, reply: Message | None) -> ClientUpdate | None:
        """The update as if it had begun from the present state; None if it does not count."""
        client, staleness = flight.client, self.number - flight.number
        answer = self.roster.answers(self.roster.nodes[client], [client], reply)[client]
        if self._is_behind(client, answer):
            self.roster.infos[client] = replace(self.roster.infos[client], known_base_version=0)
            self.depart(flight)
            return None
        if staleness > self.rules.oldest:
            self._fail(client, AwayError(f"client {client} answered {staleness} rounds late, and is not counted"))
            return None
        if flight.sent is not None:  # else its question could not be sent, and there is no answer
            self.sent[client] = flight.sent
        self._counted[client] = self.roster.infos[client].num_examples  # cut when the round's clients are known
        update = self._settle(client, answer)
        if update is None:
            return None
        self.staleness[client] = staleness
        self.answers[client] |= {"asked": flight.asked, "answered": self.flights.clock.now()}
        share = self.rules.share(staleness)
        if flight.make is self.make_broadcast and share == 1.0:  # not where the state of its round was undone since
            return update
        made = self.make_broadcast(self.roster.infos[client])
        present = wire.as_received(made, self.config.wire.dtype)
        update = rebased(update, self.sent[client].adapter, present.adapter, share, anew=self.anew)
        self.sent[client] = present
        if self.keep:
            self.kept[-1] = update
        return update


def _at_most(update: ClientUpdate, weights: Mapping[int, int]) -> ClientUpdate:
    """The update with the number of examples with which its client counts."""
    return replace(update, num_examples=min(update.num_examples, weights[update.client_id]))
