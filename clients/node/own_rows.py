"""Notices when a node's own rows change, by a fingerprint of its data file in its state folder.

The fingerprint never leaves the node. To a run, a client with other rows is another client, even with as many rows.
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
    """Report a changed data file in the node's log and events.

    Args:
        settings: the node's config; without a data file or a state folder, nothing is compared.
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
        _log.warning("the rows of this node cannot be compared with its earlier ones: %s", error)
        return
    if before:
        _log.warning(
            "the rows of this node have changed since %s: its file now has %d bytes, and had %s; earlier rounds were "
            "trained on other rows",
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
