"""The server's audit log: which runs were handed in, with which config, which node answered what, who was refused.

JSON lines in the server's own state folder, beyond the runs' own; no rows, no texts but refusals' reasons.
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

# The file that `fedlora server` names for its runs.
VARIABLE = "FEDLORA_AUDIT"
_KEPT = frozenset(
    {"run-submitted", "client-met", "client-joined", "client-answered", "client-failed", "round-end", "run-ended"}
)


@contextmanager
def audited(config: Config, run_id: int, record: RunRecord) -> Iterator[None]:
    """Around a run, where its server keeps such a log; its last line is what the record ends with."""
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
    """Of a reply's tensors, where such a log is kept; empty elsewhere."""
    if not os.environ.get(VARIABLE):
        return ""
    whole = hashlib.sha256()
    for record in content.array_records.values():
        for array in record.values():
            whole.update(array.data)
    return whole.hexdigest()
