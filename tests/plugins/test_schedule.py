"""A schedule of a user's own, on both engines."""

from __future__ import annotations

import json

import pytest

from fedlora.common.errors import ConfigError
from fedlora.config import parse
from fedlora.results.run_folder import resumed
from fedlora.simulations import run as simulation
from tests.federation import run_locally, tiny
from tests.plugins.module import assert_flower_gives_the_same, write_module

MINE = '''
from dataclasses import dataclass

from fedlora.strategies.schedules.base import Schedule


@dataclass(frozen=True)
class UntilGood(Schedule):
    """Rounds as long as the held-out loss falls by so much, and no longer."""

    least: float = 0.0

    def play(self, session):
        while session.done < session.rounds:
            session.play(session.done + 1)
            losses = [session.record.data["baseline"]["loss"]]
            losses += [entry["heldout"]["loss"] for entry in session.record.data["rounds"]]
            if losses[-2] - losses[-1] < self.least:
                break
'''


@pytest.fixture
def mine(tmp_path, monkeypatch):
    return write_module(tmp_path, monkeypatch, "schedules_of_mine", MINE) + ":UntilGood"


def test_it_decides_how_many_rounds_there_are(tmp_path, tiny_llama, mine):
    config = tiny(tmp_path, tiny_llama, federation__schedule=mine, federation__rounds=3)
    _, whole = run_locally(config)
    assert [entry["round"] for entry in whole["rounds"]] == [1, 2, 3]
    short = parse({"run.id": "two", "federation.schedule-options": "least=1000"}, config)
    folder, result = run_locally(short)
    assert [entry["round"] for entry in result["rounds"]] == [1]
    assert result["status"] == "completed"
    simulation.in_process(resumed(folder, ["federation.rounds=4"]))
    again = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    assert [entry["round"] for entry in again["rounds"]] == [1, 2]


@pytest.mark.slow
@pytest.mark.nightly
def test_flowers_engine_runs_it_too(tmp_path, tiny_llama, mine):
    assert_flower_gives_the_same(tiny(tmp_path, tiny_llama, federation__schedule=mine))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("asynchronous", "", r"federation\.schedule: unknown schedule 'asynchronous' .*did you mean 'synchronous'"),
        ("schedules_of_mine:No", "", "module 'schedules_of_mine' has no class 'No'"),
        ("synchronous", "wait=3", "synchronous has no option 'wait'; it has no options"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, tiny_llama, mine, name, options, message):
    with pytest.raises(ConfigError, match=message):
        run_locally(tiny(tmp_path, tiny_llama, federation__schedule=name, federation__schedule_options=options))
    assert not (tmp_path / "runs" / "tiny" / "one" / "adapter").exists()
