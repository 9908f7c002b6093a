"""The structured log of a run or a node: events.jsonl, with a line of JSON for each event."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedlora.common.events import listen
from fedlora.common.files import finite
from fedlora.common.rotation import rotate

NAME = "events.jsonl"
_STEP_SECONDS = 5.0  # steps come many times a second
_log = logging.getLogger("fedlora")


class Journal:
    """A listener for `fedlora.common.events` that writes a file.

    Training steps are written every few seconds, and all other events at once. If the disk is full, lines are lost, but
    the run goes on.

    Args:
        path: path of the file, to which lines are appended; several processes may write it.
        echo: whether the lines are also printed, in a short form.
        most: size in bytes at which the file is renamed (see `rotation`); 0: no limit.
        always: facts for every line, such as the node's number.
    """

    def __init__(self, path: Path, *, echo: bool = False, most: int = 0, **always: Any) -> None:
        self._path, self._echo, self._most, self._always = path, echo, most, always
        self._stepped: dict[tuple[str, int | None], float] = {}
        self._failed = False
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, kind: str, facts: dict[str, Any]) -> None:
        """One event."""
        if kind.endswith("-step"):
            now = time.monotonic()
            who = (kind, facts.get("client_id"))
            if now - self._stepped.get(who, -math.inf) < _STEP_SECONDS:
                return
            self._stepped[who] = now
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = {"time": now, "event": kind, **self._always, **_flat(facts)}
        if self._echo:
            print(kind, *(f"{name}={_short(value)}" for name, value in line.items() if name not in ("time", "event")))
        try:
            if self._most:
                rotate(self._path, self._most)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, allow_nan=False, default=str) + "\n")
        except (OSError, ValueError) as error:
            if not self._failed:
                self._failed = True  # set before the warning, which is an event as well
                _log.warning("%s: cannot be written: %s", self._path, error)


@contextmanager
def journal_to(path: Path, *, echo: bool = False, most: int = 0, **always: Any) -> Iterator[None]:
    """Within the block, write all events and FedLoRA's log lines to a file; arguments as in `Journal`."""
    journal = Journal(path, echo=echo, most=most, **always)
    handler = _LogLines(journal)
    _log.addHandler(handler)
    try:
        with listen(journal):
            yield
    finally:
        _log.removeHandler(handler)


def read(path: Path) -> list[dict[str, Any]]:
    """The events in a file, in order; incomplete lines are left out."""
    if not path.is_file():
        return []
    events = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return [event for event in events if isinstance(event, dict) and {"event", "time"} <= event.keys()]


class _LogLines(logging.Handler):
    """Writes log lines to a journal, as events."""

    def __init__(self, journal: Journal) -> None:
        super().__init__()
        self._journal = journal

    def emit(self, record: logging.LogRecord) -> None:
        self._journal("log", {"level": record.levelname.lower(), "message": record.getMessage()})


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else json.dumps(value, ensure_ascii=False, default=str)


def _flat(facts: dict[str, Any]) -> dict[str, Any]:
    """The facts of an event for one line; of a round's record, only its numbers and texts."""
    entry = facts.get("entry")
    if isinstance(entry, dict):
        counts = {"clients": len(entry["clients"]), "failures": len(entry["failures"])}
        single = {name: value for name, value in entry.items() if isinstance(value, int | float | str)}
        if "time" in single:  # of the run's clock; a line's own time is that of this machine
            single["round-time"] = single.pop("time")
        by = {"heldout-by": entry["heldout-by"]} if "heldout-by" in entry else {}
        return finite({**single, **counts, "heldout": entry.get("heldout"), **by, "seconds": entry["seconds"]})
    return finite(facts)
