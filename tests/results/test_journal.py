"""The structured log: one line of JSON for each event, whatever happens to the disk."""

import json
import logging
from datetime import datetime

from fedlora.common.events import emit
from fedlora.results import journal


def test_each_event_is_one_line_with_its_time_round_and_node(tmp_path, capsys):
    path = tmp_path / "run" / journal.NAME
    with journal.journal_to(path, echo=True, node=7):
        emit("client-done", client_id=1, round=2, metrics={"train-loss": 0.5, "codec-error": float("nan")})
        emit("client-failed", client_id=3, round=2, reason="a\nb")
        logging.getLogger("fedlora").warning("waiting for %d", 3)
    emit("client-done", client_id=9, round=9, metrics={})
    events = journal.read(path)
    assert len(path.read_text().splitlines()) == len(events) == 3
    assert [(e["event"], e["node"], e.get("round")) for e in events] == [
        ("client-done", 7, 2),
        ("client-failed", 7, 2),
        ("log", 7, None),
    ]
    assert events[0]["metrics"] == {"train-loss": 0.5, "codec-error": None}
    assert events[2]["message"] == "waiting for 3"
    assert all(event["time"].endswith("+00:00") for event in events)
    assert 'client-failed node=7 client_id=3 round=2 reason="a\\nb"' in capsys.readouterr().out


def test_steps_are_thinned_and_a_rounds_entry_fits_a_line(tmp_path):
    path = tmp_path / journal.NAME
    with journal.journal_to(path):
        for step in range(1, 1001):
            emit("client-step", client_id=0, step=step, steps=1000, loss=1.0, round=1)
        entry = {"round": 1, "train-loss": 1.0, "clients": {0: {}, 1: {}}, "failures": {2: "x"}, "norms": {"m": 1.0}}
        emit("round-end", entry=entry | {"time": 7.5, "seconds": {"round": 1.5}, "heldout": {"loss": 2.0}})
    steps = [event for event in journal.read(path) if event["event"] == "client-step"]
    assert 1 <= len(steps) < 10
    [end] = [event for event in journal.read(path) if event["event"] == "round-end"]
    assert (end["clients"], end["failures"], end["heldout"], end["round"]) == (2, 1, {"loss": 2.0}, 1)
    assert "norms" not in end
    assert end["round-time"] == 7.5
    assert datetime.fromisoformat(end["time"]).tzinfo, "the time of a run's own clock is another"


def test_a_disk_that_takes_no_more_costs_lines_and_is_told_once(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with journal.journal_to(tmp_path / "file" / journal.NAME):
        for _ in range(3):
            emit("round-start", round=1)
    assert len([record for record in caplog.records if "cannot be written" in record.message]) == 1


def test_lines_that_are_cut_off_are_left_out(tmp_path):
    path = tmp_path / journal.NAME
    whole = {"event": "a", "time": "2026-01-01T00:00:00+00:00"}
    path.write_text(json.dumps(whole) + '\n[1]\n"x"\n{"event": "c"}\n{"event": "b", "ti')
    assert journal.read(path) == [whole]
    assert journal.read(tmp_path / "missing") == []
