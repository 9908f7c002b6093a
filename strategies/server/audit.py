"""The server's audit log: the runs and their configs, each node's answers, and all refusals.

It has JSON lines in the server's own state folder, apart from the logs of runs. It contains no rows, and no texts of
clients except the reasons of refusals.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flwr.app import RecordDict

from fedlora.common import rotation
from fedlora.common.events import emit, listen
from fedlora.config import Config
from fedlora.results.journal import Journal
from fedlora.results.record import RunRecord

# Environment variable with the path of the log, which `fedlora server` sets for its runs.
VARIABLE = "FEDLORA_AUDIT"
_KEPT = frozenset(
    {"run-submitted", "client-met", "client-joined", "client-answered", "client-failed", "round-end", "run-ended"}
)


@contextmanager
def audited(config: Config, run_id: int, record: RunRecord) -> Iterator[None]:
    """Around a run, write the server's audit log, if it has one; the last line has the status of the record."""
    path = os.environ.get(VARIABLE)
    if not path:
        yield
        return
    journal = Journal(Path(path), most=rotation.MOST_BYTES, run=str(run_id))

    def listener(kind: str, facts: dict[str, Any]) -> None:
        if kind in _KEPT:
            journal(kind, facts)

    with listen(listener):
        flat = config.to_flat()
        text = json.dumps(flat, sort_keys=True)
        emit(
            "run-submitted",
            by=config.run.by,
            config=flat,
            config_sha256=hashlib.sha256(text.encode()).hexdigest(),
            resumed=config.run.resume,
        )
        try:
            yield
        finally:
            emit("run-ended", status=record.data["status"], reason=record.data.get("error", ""))


def digest(content: RecordDict) -> str:
    """The sha256 of a reply's tensors; empty if the server has no audit log."""
    if not os.environ.get(VARIABLE):
        return ""
    whole = hashlib.sha256()
    for record in content.array_records.values():
        for array in record.values():
            whole.update(array.data)
    return whole.hexdigest()
