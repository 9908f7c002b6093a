"""Where a run stands: its round, its clients, their last losses. Read from its folder, while it runs or afterwards."""

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
    """Args:
    client_id, rank: as the client said.
    round: the last one that it answered; 0 for none.
    train_loss: mean over that round's steps.
    test_loss: on its own test rows, when last evaluated.
    seconds: that its training took.
    note: where it stands in the present round.
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
    """Args:
    folder: the run's.
    status: running, completed, failed, interrupted; or died, where its process is gone without a word.
    error: why it failed.
    round: complete ones.
    rounds: of the whole run.
    heldout: the last held-out metrics.
    quiet_seconds: since the last event; None when no event was recorded.
    clients: in order of id.
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
    """Read it.

    Args:
        folder: a run, as `run_folder` takes it.

    Raises:
        RunError: there is no run.
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
    """What each client did in the round that is on."""
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
    """Seconds since then; None for what is no time."""
    try:
        return max(0.0, (datetime.now(UTC) - datetime.fromisoformat(str(time))).total_seconds())
    except (ValueError, TypeError):
        return None
