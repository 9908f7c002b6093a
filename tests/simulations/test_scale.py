"""What a round costs depends on the clients that it asks, and not on those that are registered."""

from __future__ import annotations

import json
import os
import random
import sys
from collections import Counter
from types import FrameType
from typing import Any

import pytest

from fedlora.common.events import listen
from fedlora.config import parse
from fedlora.results import record, run_folder
from fedlora.results.journal import read
from fedlora.results.status import status
from fedlora.strategies.server import roster
from fedlora.strategies.server.sampling import in_random_order
from tests.federation import run_locally
from tests.simulations.test_thousand import many

COUNTED = [f"{part}{os.sep}" for part in (f"{os.sep}strategies", f"{os.sep}simulations", f"fedlora{os.sep}results")]
ROUNDS = {
    "synchronous": {},
    "buffered": {"federation__schedule": "buffered", "federation__schedule_options": "size=2, at_once=4"},
    "deadline": {"federation__schedule": "deadline", "federation__traces": "lognormal"},
}


def calls_of_a_round(folder, model, clients: int, **keys: Any) -> int:
    """Number of calls by the server and the engine in the third round, when all that is made once has been made."""
    counted: Counter[str] = Counter()

    def profile(frame: FrameType, event: str, _argument: object) -> None:
        if any(part in frame.f_code.co_filename for part in COUNTED):  # a builtin has the frame of its caller
            counted[event] += 1

    def heard(kind: str, facts: dict[str, Any]) -> None:
        if kind == "round-start" and facts["round"] == 3:
            sys.setprofile(profile)
        elif kind == "round-end":
            sys.setprofile(None)

    with listen(heard):
        run_locally(many(folder, model, clients, evaluate__server=False, lora__ranks="2", **keys))
    return counted["call"] + counted["c_call"]


@pytest.mark.parametrize("schedule", ROUNDS)
def test_a_round_calls_as_many_functions_with_many_clients_as_with_few(tmp_path, tiny_llama, schedule):
    few, lots = (calls_of_a_round(tmp_path / str(n), tiny_llama, n, **ROUNDS[schedule]) for n in (60, 3000))
    assert few > 1000
    assert abs(lots - few) < 1500  # far from one call for each client


def test_many_clients_are_listed_beside_the_record_once(tmp_path, tiny_llama, monkeypatch):
    monkeypatch.setattr(record, "MOST_LISTED", 3)
    monkeypatch.setattr(roster, "_MOST_TOLD", 3)
    keys = {"evaluate__server": False, "federation__rounds": 1}
    folder, result = run_locally(config := many(tmp_path / "one", tiny_llama, 12, **keys))
    assert "clients" not in result
    listed = run_folder.stored(folder)["clients"]
    _, whole = run_locally_with(tmp_path / "two", tiny_llama, monkeypatch, keys)
    assert listed == whole["clients"]
    assert [about["client-id"] for about in listed] == list(range(12))
    met = [event for event in read(folder / "events.jsonl") if event["event"] in ("client-met", "clients-met")]
    assert [(event["event"], event["clients"], event["ranks"]) for event in met] == [
        ("clients-met", 12, {"4": 3, "2": 6, "1": 3})
    ]
    assert len(status(folder).clients) == 12

    more = parse({"federation.rounds": 2, "run.resume": True}, config)
    _, resumed = run_locally(more)
    assert len(resumed["rounds"]) == 2
    assert "clients" not in resumed
    assert run_folder.stored(folder)["clients"] == listed


def run_locally_with(folder, model, monkeypatch, keys):
    with monkeypatch.context() as patch:
        patch.setattr(record, "MOST_LISTED", 1000)
        patch.setattr(roster, "_MOST_TOLD", 1000)
        return run_locally(many(folder, model, 12, **keys))


def test_a_client_that_joins_is_added_to_the_list(tmp_path):
    path = tmp_path / "clients.jsonl"
    lines = [{"client-id": 1, "rank": 4}, {"client-id": 0, "rank": 2}, {"client-id": 1, "rank": 8}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run_folder._listed(path) == [{"client-id": 0, "rank": 2}, {"client-id": 1, "rank": 8}]


@pytest.mark.parametrize("first", [0, 1, 7, 40])
def test_a_random_order_begins_as_a_sample_and_has_all_clients_once(first):
    clients = list(range(100, 140))
    order = list(in_random_order(clients, first, random.Random("seed")))
    assert order[:first] == random.Random("seed").sample(clients, first)
    assert sorted(order) == clients


def test_every_client_is_as_likely_in_every_place_of_a_random_order():
    places: Counter[tuple[int, int]] = Counter()
    for seed in range(3000):
        places.update(enumerate(in_random_order(range(6), 1, random.Random(seed))))
    assert len(places) == 36
    # 500 expected in each, with a standard deviation of 20
    assert max(abs(count - 500) for count in places.values()) < 100
