"""The progress of a run (its round, its clients, their last losses), read from its folder while it runs or later."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from . import journal
from .run_folder import is_taken, stored
from .runs import run_folder


@dataclass(frozen=True)
class ClientStatus:
    """The progress of one client.

    Args:
        client_id: number of the client.
        rank: the client's rank.
        round: the last round in which the client's reply counted; 0: none.
        train_loss: mean training loss over that round's steps.
        test_loss: loss on the client's own test rows, when last evaluated.
        seconds: seconds that its training took.
        note: text about the client in the present round.
    """

    client_id: int
    rank: int
    round: int = 0
    train_loss: float | None = None
    test_loss: float | None = None
    seconds: float | None = None
    note: str = ""


@dataclass(frozen=True)
class RunStatus:
    """The progress of a run.

    Args:
        folder: the run's folder.
        status: running, completed, failed, interrupted; or died, if its process ended without recording why.
        error: the error with which the run failed; empty if it did not.
        round: number of complete rounds.
        rounds: number of rounds of the whole run.
        heldout: the last held-out metrics.
        quiet_seconds: seconds since the last event; None if no event was recorded.
        clients: the clients, in the order of their ids.
    """

    folder: Path
    status: str
    error: str
    round: int
    rounds: int
    heldout: Mapping[str, float]
    quiet_seconds: float | None
    clients: list[ClientStatus] = field(default_factory=list)


def status(folder: Path) -> RunStatus:
    """Read the progress of a run.

    Args:
        folder: the run; see `run_folder`.

    Raises:
        RunError: there is no such run.
    """
    folder = run_folder(folder)
    data = stored(folder)
    events = journal.read(folder / journal.NAME)
    entries = [entry for entry in data["rounds"] if entry["round"]]
    ended = entries[-1]["round"] if entries else 0
    state = data["status"]
    if state == "running" and not is_taken(folder):
        state = "died"
    now = _present(events, ended) if state == "running" else {}
    scored = [entry["heldout"] for entry in entries if "heldout" in entry]
    return RunStatus(
        folder=folder,
        status=state,
        error=data.get("error", ""),
        round=ended,
        rounds=data["config"]["federation.rounds"],
        heldout=scored[-1] if scored else data.get("baseline", {}),
        quiet_seconds=_since(events[-1]["time"]) if events else None,
        clients=[_client(about, entries, now) for about in data.get("clients", [])],
    )


def _present(events: list[dict[str, Any]], ended: int) -> dict[int, str]:
    """Client id -> text about the client in the present round."""
    notes: dict[int, str] = {}
    number = ended + 1
    for event in events:
        if event["event"] == "round-start" and event.get("round") == number:
            notes = {}
        if event.get("round") != number or event.get("client_id") is None:
            continue
        match event["event"]:
            case "client-start":
                notes[event["client_id"]] = f"round {number}: trains"
            case "client-step":
                notes[event["client_id"]] = f"round {number}: step {event.get('step')} of {event.get('steps')}"
            case "client-done":
                notes[event["client_id"]] = f"round {number}: answered"
            case "client-failed":
                notes[event["client_id"]] = f"round {number}: not counted: {event.get('reason')}"
    return notes


def _client(about: Mapping[str, Any], entries: list[dict[str, Any]], now: Mapping[int, str]) -> ClientStatus:
    client, key = about["client-id"], str(about["client-id"])
    answers = [(entry["round"], entry["clients"][key]) for entry in entries if key in entry["clients"]]
    tests = [t["clients"][key] for t in (e.get("client-test", {}) for e in entries) if key in t.get("clients", {})]
    failures = entries[-1]["failures"] if entries else {}
    round, metrics = answers[-1] if answers else (0, {})
    note = now.get(client) or (f"round {entries[-1]['round']}: {failures[key]}" if key in failures else "")
    return ClientStatus(
        client_id=client,
        rank=about["rank"],
        round=round,
        train_loss=metrics.get("train-loss"),
        test_loss=tests[-1].get("loss") if tests else None,
        seconds=metrics.get("train-seconds"),
        note=note,
    )


def _since(time: object) -> float | None:
    """Seconds since a time; None if the value is not a time."""
    try:
        return max(0.0, (datetime.now(UTC) - datetime.fromisoformat(str(time))).total_seconds())
    except (ValueError, TypeError):
        return None
