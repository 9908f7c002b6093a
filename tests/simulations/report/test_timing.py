"""The figures of runs on a virtual clock."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from fedlora.simulations import report
from fedlora.simulations.report.figures.timing import idle_share, staleness
from tests.federation import run_locally, tiny
from tests.simulations.comparison.helpers import write_comparison


def entry(number: int, time: float, spans: dict[str, tuple[float, float]], **more: Any) -> dict[str, Any]:
    """A round of the record, with (asked, answered) of each client that counted."""
    clients = {client: {"asked": asked, "answered": answered} for client, (asked, answered) in spans.items()}
    return {"round": number, "time": time, "clients": clients, "failures": {}, **more}


def test_the_idle_share_of_synchronous_rounds_is_what_the_fast_client_waits():
    first = entry(1, 10.0, {"0": (0.0, 10.0), "1": (0.0, 4.0)})
    second = entry(2, 20.0, {"0": (10.0, 20.0), "1": (10.0, 14.0)})
    assert idle_share({"rounds": [first, second]}) == pytest.approx(1 - (10 + 4 + 10 + 4) / (2 * 20))


def test_trainings_that_go_on_and_clients_that_failed_are_counted():
    about = {"at-once": 3, "training-seconds": 5.0}
    assert idle_share({"rounds": [entry(1, 10.0, {"0": (0.0, 10.0)}, **about)]}) == pytest.approx(1 - 15 / 30)
    failed = entry(1, 10.0, {"0": (0.0, 10.0)}) | {"failures": {"1": "gone"}}
    assert idle_share({"rounds": [failed]}) == pytest.approx(0.5)


def test_each_round_counts_as_many_clients_as_it_had_at_once():
    first = entry(1, 10.0, {"0": (0.0, 10.0)}, **{"at-once": 2})
    second = entry(2, 15.0, {"1": (0.0, 15.0), "0": (10.0, 12.0)}, **{"at-once": 4, "training-seconds": 0.0})
    assert idle_share({"rounds": [first, second]}) == pytest.approx(1 - (10 + 15 + 2) / (2 * 10 + 4 * 5))


def test_a_run_without_a_virtual_clock_has_no_idle_share():
    untimed = {"round": 1, "clients": {"0": {}}, "failures": {}}
    assert idle_share({"rounds": [untimed]}) is None
    assert not staleness([{"rounds": [untimed]}])


def test_updates_are_counted_by_staleness():
    stale = entry(1, 1.0, {"0": (0.0, 1.0), "7": (0.0, 1.0)}, staleness={"0": 2, "7": 0})
    synchronous = entry(1, 1.0, {"0": (0.0, 1.0)})
    assert staleness([{"rounds": [stale]}, {"rounds": [synchronous]}]) == {0: 2, 2: 1}


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_report_of_a_run_on_traces_shows_its_hours(tmp_path, tiny_llama):
    keys = {"federation__schedule": "buffered", "federation__schedule_options": "size=2, at_once=3"}
    config = tiny(tmp_path, tiny_llama, federation__traces="lognormal", strategy__name="fedavg-zeropad", **keys)
    folder, result = run_locally(config)
    page = report.write(folder).read_text(encoding="utf-8")
    figures = folder / "report" / "figures"
    hours = [float(row["hours"]) for row in rows_of(figures / "metric-hours.csv") if row["metric"] == "loss"]
    assert hours == pytest.approx([0.0, *(entry["time"] / 3600 for entry in result["rounds"])])
    numbers = rows_of(figures / "timing.csv")
    share = next(float(row["value"]) for row in numbers if row["number"] == "idle share")
    assert abs(share) < 1e-9  # three train at any time, to the end
    assert sum(int(row["value"]) for row in numbers if row["number"] == "updates") == 4
    assert 'id="figure-timing"' in page


def test_a_comparison_draws_hours_where_runs_have_them(tmp_path):
    arms = {"strategies": ("fedavg", "flora"), "baselines": (), "scenarios": ("equal",), "seeds": (0, 1)}
    folder = write_comparison(tmp_path, **arms)
    for path in (folder / "cells").rglob("*.json"):
        cell = json.loads(path.read_text())
        for run in cell["runs"]:
            for at in run["rounds"]:
                at["time"] = 3600.0 * at["round"]
                at["staleness"] = dict.fromkeys(at["clients"], at["round"] % 2)
                for client in at["clients"].values():
                    client |= {"asked": at["time"] - 1800.0, "answered": at["time"]}
        path.write_text(json.dumps(cell))
    report.write(folder)
    figures = folder / "report" / "figures"
    points = rows_of(figures / "metric-hours-equal.csv")
    assert {row["strategy"] for row in points} == {"fedavg", "flora"}
    assert all(float(row["hours"]) == float(row["round"]) for row in points)
    shares = [float(row["value"]) for row in rows_of(figures / "timing-equal.csv") if row["number"] == "idle share"]
    assert shares == pytest.approx([0.5, 0.5])
