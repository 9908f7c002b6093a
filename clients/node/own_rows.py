"""Whether a node's own rows are those that it had: a fingerprint of its data file, kept in its state folder.

It never leaves the node. A client that goes on with other rows is another client to the run, whatever their number.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from fedlora.common.events import emit
from fedlora.common.files import write_json
from fedlora.config import Scalar

from . import rules

NAME = "rows.json"
_log = logging.getLogger("fedlora")


def look(settings: Mapping[str, Scalar]) -> None:
    """Tell, in the node's log and events, when its data file holds something else than it did before.

    Args:
        settings: the node's config; without a data file, or a state folder, there is nothing to look at.
    """
    path, state = rules.own_data(settings), settings.get("state")
    if not path or not state:
        return
    try:
        about = Path(path).stat()
        now = _fingerprint(path, about.st_size, about.st_mtime_ns)
        kept = Path(str(state)) / NAME
        before = _kept(kept)
        if before.get("sha256") == now:
            return
        known = {"sha256": now, "bytes": about.st_size, "since": datetime.now(UTC).isoformat(timespec="seconds")}
        write_json(kept, known)
    except OSError as error:
        _log.warning("the rows of this node cannot be compared with those that it had: %s", error)
        return
    if before:
        _log.warning(
            "the rows of this node have changed since %s: its file has %d bytes now, it had %s; what it learned before "
            "was of other rows",
            before.get("since"),
            about.st_size,
            before.get("bytes"),
        )
        emit("rows-changed", before=before, now=known)


def _kept(path: Path) -> dict[str, str | int]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@functools.lru_cache(maxsize=16)
def _fingerprint(path: str, size: int, changed: int) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
