"""Clients in flight: each is heard once, whatever it sends, and given up when it is overdue."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from uuid import uuid4

import pytest
from flwr.app import Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedlora.common.errors import RunError
from fedlora.strategies.server import flights as module
from fedlora.strategies.server import mailbox
from fedlora.strategies.server.clock import WallClock
from fedlora.strategies.server.flights import Flight, Flights


class Scripted:
    """A grid whose answers come when a test says so."""

    def __init__(self) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 0
        self.asked: dict[str, Message] = {}
        self.there: list[Message] = []

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        pushed = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid4())
            self.asked[message.metadata.message_id] = message
            pushed.append(message.metadata.message_id)
        return pushed

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        there, self.there = self.there, []
        return there

    def get_node_ids(self) -> list[int]:
        return [10, 11]

    def answers(self, client: int, times: int = 1) -> None:
        """A client's node answers its latest question, once or more often."""
        question = [m for m in self.asked.values() if m.metadata.dst_node_id == 10 + client][-1]
        self.there += [Message(RecordDict(), reply_to=question) for _ in range(times)]


class Roster:
    nodes = {0: 10, 1: 11, 2: 12, 3: 13}  # noqa: RUF012 - a constant

    def message(self, node: int, clients: list[int], encoded: Any) -> RecordDict:
        return encoded(clients[0])


class Clock:
    limit = float("inf")
    time = 0.0

    def now(self) -> float:
        return self.time

    def go(self, to: float) -> None:
        self.time = to

    def pause(self, seconds: float) -> None:
        self.time += seconds


@pytest.fixture
def made():
    grid, clock = Scripted(), Clock()
    given: Any = grid
    flights = Flights(given, clock, timeout=100.0)

    def depart(client: int, number: int) -> None:
        roster: Any = Roster()
        flight = Flight(client, number, clock.now(), make=lambda info: None)  # pyright: ignore[reportArgumentType]
        flights.ask(flight, roster, lambda client: RecordDict())

    return grid, clock, flights, depart


def test_a_client_that_answers_twice_is_heard_once(made):
    grid, clock, flights, depart = made
    depart(0, 1)
    depart(1, 1)
    grid.answers(0, times=2)
    assert [flight.client for flight, _ in flights.hear(float("inf"))] == [0]
    grid.answers(0)  # once more, after it was heard
    assert flights.hear(clock.now() + 1.0) == []
    assert {*flights.open} == {1}


def test_an_answer_to_an_older_question_does_not_count_for_the_present_one(made):
    """As of a version that nobody holds any more: the client was given up, and asked anew."""
    grid, clock, flights, depart = made
    depart(0, 1)
    late = grid.asked[next(iter(grid.asked))]
    clock.go(101.0)
    [(overdue, answer)] = flights.hear(float("inf"))
    assert (overdue.number, answer) == (1, None)
    depart(0, 5)
    grid.there.append(Message(RecordDict(), reply_to=late))
    assert flights.hear(clock.now() + 1.0) == []
    grid.answers(0)
    [(flight, answer)] = flights.hear(float("inf"))
    assert flight.number == 5
    assert answer is not None


def test_a_question_that_was_given_up_is_neither_sent_nor_repeated(made, monkeypatch):
    """One waits for its turn, and the other's node would be asked anew when the connection was lost."""
    grid, clock, flights, depart = made
    grid.window_for = lambda kind: 1
    depart(0, 1)
    depart(1, 1)
    clock.go(100.0)
    assert [(flight.client, answer) for flight, answer in flights.hear(float("inf"))] == [(0, None), (1, None)]
    monkeypatch.setattr(mailbox, "_reconnects", lambda grid: 1)
    assert flights.hear(clock.now() + 1.0) == []
    depart(0, 2)
    assert flights.hear(clock.now() + 1.0) == []
    assert [message.metadata.dst_node_id for message in grid.asked.values()] == [10]
    grid.answers(0)  # the question that was given up, whose node is free now
    assert flights.hear(clock.now() + 1.0) == []
    assert [message.metadata.dst_node_id for message in grid.asked.values()] == [10, 10]
    grid.answers(0)
    [(flight, answer)] = flights.hear(float("inf"))
    assert flight.number == 2
    assert answer is not None


def test_what_came_together_and_was_not_used_is_there_the_next_time(made):
    grid, _, flights, depart = made
    depart(0, 1)
    depart(1, 1)
    grid.answers(1)
    grid.answers(0)
    first, second = flights.hear(float("inf"))
    assert (first[0].client, second[0].client) == (0, 1)
    flights.put_back([second])
    assert {*flights.open} == {1}
    assert flights.hear(float("inf")) == [second]
    assert not flights.open


def test_who_is_training_is_read_back_and_a_damaged_file_is_one_sentence(made, tmp_path):
    _, clock, flights, depart = made
    depart(0, 3)
    clock.go(7.0)
    depart(1, 4)
    assert flights.save(tmp_path, 4) == {2, 3}
    assert module.saved(tmp_path, 4) == (7.0, [(0, 3, 0.0), (1, 4, 7.0)])
    (tmp_path / "training-4.json").write_text("{}")
    with pytest.raises(RunError, match=r"training-4.json: not readable .*; this run cannot continue"):
        module.saved(tmp_path, 4)


def test_the_clock_of_a_resumed_run_goes_on_from_where_it_was():
    clock = WallClock()
    clock.go(5000.0)
    first = clock.now()
    clock.pause(0.01)
    assert 5000.0 <= first < clock.now() < 5600.0


def test_nothing_is_heard_of_a_client_that_was_turned_away(made):
    """Neither an answer that comes, nor one that was put back; a question that waits for its turn is not sent."""
    grid, clock, flights, depart = made
    grid.window_for = lambda kind: 2
    for client in range(4):
        depart(client, 1)
    grid.answers(0)
    flights.put_back(flights.hear(float("inf")))
    flights.give_up([0, 1, 3])
    assert {*flights.open} == {2}
    grid.answers(1)
    grid.answers(2)
    assert [flight.client for flight, _ in flights.hear(float("inf"))] == [2]
    assert flights.hear(clock.now() + 1.0) == []
    assert {message.metadata.dst_node_id for message in grid.asked.values()} == {10, 11, 12}
